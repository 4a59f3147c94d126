"""Checkpoints of several processes: torch's distributed checkpoints (DCP), in its safetensors storage.

Each process writes what it holds, and what all hold once; names, shapes and places stand in the files' headers. The
usual storage of DCP keeps them in a pickle, and its way to put the parts together in one file refuses integers and
writes zeros for tensors without dimensions (torch 2.13); so the parts stay apart, and our manifest lists them. They
are read with any number of processes, also one; and so is a checkpoint of one process.
"""

import os
import shutil
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from sentei.core.errors import FileError
from sentei.core.storage import cannot_write
from sentei.training import checkpoints

UNFINISHED = "unfinished-checkpoint"  # the folder in which the parts appear; a killed run leaves it for the next


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """As `checkpoints.save`, by all processes of the group; they share the folder.

    Raises:
        ResourceError: no room, or a folder that cannot be written.
    """
    parts = folder / UNFINISHED
    if distributed.get_rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)
    distributed.barrier()
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(parts), save_distributed=True))
    except CheckpointException as error:
        wrong = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        if not wrong:
            raise
        raise cannot_write(parts, wrong[0]) from error
    if distributed.get_rank() == 0:
        checkpoints.keep(folder, step, [partial(os.replace, path) for path in sorted(parts.iterdir())], about)
        shutil.rmtree(parts)
    distributed.barrier()


def shapes(found: checkpoints.Checkpoint) -> dict[str, torch.Size]:
    """The shapes of the tensors, by name.

    Raises:
        FileError: parts that do not make whole tensors.
    """
    try:
        about = _reader(found).read_metadata().state_dict_metadata
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _broken(found, "headers that say so little") from error
    for name, tensor in about.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise _broken(found, f"{name} in parts with gaps")
    return {name: tensor.size for name, tensor in about.items()}


def fill(found: checkpoints.Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a checkpoint into `tensors`, in place; each process reads what it holds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as one process means it to be
        dcp.load(tensors, storage_reader=_reader(found))


class _Listed(FileSystem):
    """The files of one checkpoint, in a folder with others."""

    def __init__(self, files: tuple[Path, ...]):
        super().__init__()
        self.files = files

    def ls(self, path):
        return [str(file) for file in self.files]


def _reader(found: checkpoints.Checkpoint) -> HuggingFaceStorageReader:
    reader = HuggingFaceStorageReader(str(found.files[0].parent))
    reader.fs = _Listed(found.files)
    return reader


def _broken(found: checkpoints.Checkpoint, got: str) -> FileError:
    return FileError(str(found.files[0]), expected="parts that sentei train wrote together", got=got,
                     do="remove this checkpoint; one before it may be whole")
