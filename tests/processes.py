"""Runs a function in several processes of this machine that form a group, and says how each of them ended."""

import faulthandler
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

LIMIT = 120  # seconds, after which processes that hang are ended
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sentei.training.distributed", "sentei.training.job", "torch._dynamo",
                                "safetensors.torch"])


def run(work: Callable, size: int, *arguments) -> list:
    """`work(*arguments)` in `size` processes, one group.

    Returns:
        by rank, what it returned, a JSON value; or [the error's kind, its text]; or its exit code, if it had no time to
        say either.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [CONTEXT.Process(target=_work, args=(work, rank, size, Path(folder), arguments), daemon=True)
                     for rank in range(size)]
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"{len(hung)} of {size} processes hung"
        paths = [Path(folder) / f"{rank}.json" for rank in range(size)]
        return [json.loads(path.read_text()) if path.exists() else process.exitcode
                for path, process in zip(paths, processes, strict=True)]


def _work(work: Callable, rank: int, size: int, folder: Path, arguments: tuple) -> None:
    faulthandler.dump_traceback_later(LIMIT - 10, file=sys.__stderr__)  # says where a process hangs
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size,
                                   timeout=timedelta(seconds=LIMIT / 2))
    try:
        result = work(*arguments)
    except BaseException as error:  # noqa: BLE001
        result = [type(error).__name__, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()
