"""Checkpoints: one safetensors file and, written after it, one JSON file that says what must be in it.

A checkpoint counts once its JSON file is there; a kill at any moment leaves the one before whole. Nothing is pickled:
the state of random numbers is a tensor of bytes.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sentei.core.errors import FileError
from sentei.core.safetensors_header import read_header
from sentei.core.storage import read_json, sha256, write_json, write_whole

SCHEMA = "sentei.checkpoint/1"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})\.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and is whole.

    Args:
        step: how many steps were done.
        tensors: by name.
        about: what was saved beside them, a JSON object.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    about: dict


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Writes a checkpoint and then removes all but the newest KEPT.

    Raises:
        ResourceError: no room, or a folder that cannot be written; the checkpoints before are as they were.
    """
    from safetensors.torch import save_file

    data, manifest = _data(folder, step), _manifest(folder, step)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(data, partial(save_file, contiguous))
    write_json(manifest, {"schema": SCHEMA, "step": step, "bytes": data.stat().st_size, "sha256": sha256(data),
                          "about": about})
    kept = steps(folder)[-KEPT:]
    for old in steps(folder)[:-KEPT]:
        _manifest(folder, old).unlink()  # first: a checkpoint without its data must not count
    for path in folder.glob("checkpoint-*.safetensors"):
        if path not in [_data(folder, step) for step in kept]:
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
    from safetensors.torch import load_file

    *before, step = saved
    try:
        about = _check(folder, step)
    except FileError as error:
        good = next((old for old in reversed(before) if _is_whole(folder, old)), None)
        go_on = "to begin again" if good is None else f"to go on from {_manifest(folder, good).stem}, which is whole"
        raise FileError(error.where, expected=error.expected, got=error.got,
                        do=f"remove {_manifest(folder, step)} {go_on}") from error
    return Checkpoint(step=step, tensors=load_file(_data(folder, step)), about=about)


def _check(folder: Path, step: int) -> dict:
    """What stands beside the tensors of a checkpoint that is whole."""
    path, manifest = _data(folder, step), read_json(_manifest(folder, step))
    if manifest.get("schema") != SCHEMA or manifest.get("step") != step or not isinstance(manifest.get("about"), dict):
        raise FileError(str(_manifest(folder, step)), expected=f"step {step} as {SCHEMA}", got="something else", do="")
    size = path.stat().st_size if path.is_file() else None
    if size != manifest.get("bytes"):
        raise FileError(str(path), expected=f"{manifest.get('bytes')} bytes", got="none" if size is None else f"{size}",
                        do="")
    if sha256(path) != manifest.get("sha256"):
        raise FileError(str(path), expected="the bytes that were written", got="others", do="")
    read_header(path)
    return manifest["about"]


def _is_whole(folder: Path, step: int) -> bool:
    try:
        _check(folder, step)
    except FileError:
        return False
    return True


def _data(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08}.safetensors"


def _manifest(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08}.json"
