"""GGUF files turned once into a plain model folder, kept in a cache and checked byte for byte on every use."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from sentei.conversion.families import family_of
from sentei.conversion.gguf_header import GgufHeader, read_header
from sentei.conversion.gguf_weights import settings, shapes, weights
from sentei.conversion.memory import require_memory
from sentei.conversion.model_folder import WEIGHTS
from sentei.conversion.tokenizers import read_gguf_tokenizer
from sentei.core.errors import FileError, ResourceError
from sentei.core.storage import cannot_write, read_json, sha256, sync_folder, write_json

DONE = "DONE.json"
# Raise when a conversion would come out different; folders of another format are then rebuilt.
FORMAT = 1
# Above this many weights the folder is written in bfloat16: float32 would take four to eight times the GGUF file.
MAX_FLOAT32_WEIGHTS = 1 << 30


def dequantise(path: Path, cache: Path) -> tuple[Path, GgufHeader, dict]:
    """The plain model folder made from a GGUF file, its header, and the record of the conversion.

    The record holds "format", "gguf" (SHA-256 of the GGUF file), "dtype" and "files" (bytes and SHA-256 of each).
    The first use converts (about 5 s for 135 million weights on two cores, four bytes of disk a weight); later ones
    only hash the files (about 0.5 s). Two processes that need the same file wait for each other.

    Raises:
        FileError: a malformed file, or the packages that read GGUF are missing.
        UnsupportedError: an architecture or a tensor sentei has no conversion for.
        ResourceError: the disk is too full or the cache cannot be written.
    """
    header = read_header(path)
    raw = settings(path, header)
    family = family_of(raw, str(path))
    family.check_tensors(family.build_config(raw, str(path)), shapes(path, header, raw), str(path))
    digest = sha256(path)
    folder = cache / digest[:32]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{folder.name}.lock"):
            done = _valid(folder, digest)
            if done is None:
                _build(path, header, digest, folder)
                done = read_json(folder / DONE)
    except OSError as error:
        raise cannot_write(cache, error) from error
    return folder, header, done


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _valid(folder: Path, digest: str) -> dict | None:
    """The record of a whole conversion of this GGUF file, or None when the folder must be built again."""
    if not (folder / DONE).is_file():
        return None
    try:
        done = read_json(folder / DONE)
    except FileError:  # a damaged record is the reason to rebuild, not to stop
        return None
    files = done.get("files")
    if done.get("format") != FORMAT or done.get("gguf") != digest or not isinstance(files, dict):
        return None
    if {path.name for path in folder.iterdir()} - {DONE} != files.keys():
        return None
    return done if all(_describe(folder / name) == files[name] for name in files) else None


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _build(path: Path, header: GgufHeader, digest: str, folder: Path) -> None:
    dtype = "float32" if header.elements <= MAX_FLOAT32_WEIGHTS else "bfloat16"
    size = header.elements * (4 if dtype == "float32" else 2)
    free = shutil.disk_usage(folder.parent).free
    if size + (64 << 20) > free:  # the tokenizer takes a few of the 64 MB
        raise ResourceError(str(folder.parent), expected=f"{size / 1e9 + 0.1:.1f} GB of free disk",
                            got=f"{free / 1e9:.1f} GB", do="free some space and run the same command again")
    require_memory(path, size + 4 * max(tensor.elements for tensor in header.tensors.values()))
    for stale in folder.parent.glob(f".{folder.name}.*.part"):  # the lock says that nobody builds it any more
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        target = temporary / "model"
        target.mkdir()
        _convert(path, header, dtype, temporary, target)
        files = {file.name: _describe(file) for file in sorted(target.iterdir())}
        for name in files:
            _sync(target / name)
        write_json(target / DONE, {"format": FORMAT, "gguf": digest, "dtype": dtype, "files": files})
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(target, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _convert(path: Path, header: GgufHeader, dtype: str, temporary: Path, target: Path) -> None:
    if find_spec("gguf") is None:
        raise FileError(str(path), expected="the package gguf, which unpacks GGUF weights", got="not installed",
                        do="pip install gguf")
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    raw = settings(path, header)
    tensors = weights(path, header, raw, getattr(torch, dtype))
    try:
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise cannot_write(target / WEIGHTS, error) from error
    write_json(target / "config.json", raw | {"dtype": dtype})
    # A folder that holds nothing but the GGUF file: whatever lies beside the original is never looked at.
    source = temporary / "source"
    source.mkdir()
    (source / "model.gguf").symlink_to(path.resolve())
    read_gguf_tokenizer(source, "model.gguf", header).save_pretrained(target)
