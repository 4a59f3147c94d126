"""Checkpoints: safetensors and, written after them, one JSON file that says what must be in them.

A checkpoint counts once its JSON file is there; a kill at any moment leaves the one before whole. Nothing is pickled.
One process writes one file of tensors, several write one each at most (`shards.py`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sentei.conversion.model_folder import member
from sentei.core.errors import FileError
from sentei.core.safetensors_header import read_header
from sentei.core.storage import read_json, sha256, write_json, write_whole

SCHEMA = "sentei.checkpoint/2"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})\.json")
_PART = re.compile(r"checkpoint-(\d{8})(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that is whole.

    Args:
        step: how many steps were done.
        files: of tensors.
        about: what was saved beside them, a JSON object.
    """

    step: int
    files: tuple[Path, ...]
    about: dict

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the tensors, by name.

        Raises:
            FileError: parts that do not make whole tensors.
        """
        if len(self.files) > 1:
            return _shards().shapes(self)
        return {name: torch.Size(tensor.shape) for name, tensor in read_header(self.files[0]).items()}

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes what was saved into `tensors`, whose names and shapes are those of `shapes()`, in place.

        Raises:
            FileError: another dtype.
        """
        from safetensors.torch import load_file

        if len(self.files) > 1 or any(hasattr(tensor, "device_mesh") for tensor in tensors.values()):
            _shards().fill(self, tensors)
            return
        saved = load_file(self.files[0])
        for name, tensor in tensors.items():
            if saved[name].dtype != tensor.dtype:
                raise FileError(str(self.files[0]), expected=f"{name} in {tensor.dtype}", got=str(saved[name].dtype),
                                do="remove this checkpoint; one before it may be whole")
            tensor.copy_(saved[name])


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Writes a checkpoint and then removes all but the newest KEPT.

    Raises:
        ResourceError: no room, or a folder that cannot be written; the checkpoints before are as they were.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    keep(folder, step, [partial(save_file, contiguous)], about)


def keep(folder: Path, step: int, writers: list[Callable[[Path], None]], about: dict) -> None:
    """As `save`, of parts that `writers` write, each to a path."""
    files = [folder / f"checkpoint-{step:08}{'' if len(writers) == 1 else f'-{part}-of-{len(writers)}'}.safetensors"
             for part in range(1, len(writers) + 1)]
    for path, write in zip(files, writers, strict=True):
        write_whole(path, write)
    write_json(_manifest(folder, step), {"schema": SCHEMA, "step": step, "files": {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}, "about": about})
    kept = steps(folder)[-KEPT:]
    for old in steps(folder)[:-KEPT]:
        _manifest(folder, old).unlink()  # first: a checkpoint without its data must not count
    for path in folder.glob("checkpoint-*.safetensors"):
        part = _PART.fullmatch(path.name)
        if part is None or int(part[1]) not in kept:
            path.unlink()


def steps(folder: Path) -> list[int]:
    """The steps that were saved, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*.json"))
    return sorted(int(match[1]) for match in found if match)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where none was saved.

    Raises:
        FileError: it is not what was written; the message names the newest one before it that is.
    """
    saved = steps(folder)
    return _read(folder, saved) if saved else None


def _read(folder: Path, saved: list[int]) -> Checkpoint:
    """The last of `saved`."""
    *before, step = saved
    try:
        return _check(folder, step)
    except FileError as error:
        good = next((old for old in reversed(before) if _is_whole(folder, old)), None)
        go_on = "to begin again" if good is None else f"to go on from {_manifest(folder, good).stem}, which is whole"
        raise FileError(error.where, expected=error.expected, got=error.got,
                        do=f"remove {_manifest(folder, step)} {go_on}") from error


def _check(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, if it is whole."""
    manifest = read_json(member(folder, _manifest(folder, step).name))
    files, about = manifest.get("files"), manifest.get("about")
    named = isinstance(files, dict) and len(files) > 0 and isinstance(about, dict) and all(
        isinstance(file, dict) and (match := _PART.fullmatch(name)) and int(match[1]) == step
        for name, file in files.items())
    if manifest.get("schema") != SCHEMA or manifest.get("step") != step or not named:
        raise FileError(str(_manifest(folder, step)), expected=f"step {step} as {SCHEMA}", got="something else", do="")
    for name, file in files.items():
        path = member(folder, name, required=False) or folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != file.get("bytes"):
            raise FileError(str(path), expected=f"{file.get('bytes')} bytes", got="none" if size is None else f"{size}",
                            do="")
        if sha256(path) != file.get("sha256"):
            raise FileError(str(path), expected="the bytes that were written", got="others", do="")
        read_header(path)
    return Checkpoint(step=step, files=tuple(folder / name for name in files), about=about)


def _is_whole(folder: Path, step: int) -> bool:
    try:
        _check(folder, step)
    except FileError:
        return False
    return True


def _manifest(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08}.json"


def _shards() -> object:
    """The module that reads parts, for which torch.distributed is loaded."""
    from sentei.training import shards

    return shards
