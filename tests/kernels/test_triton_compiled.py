"""The Triton kernels compile for real GPUs and fit in them: the interpreter runs code that the compiler refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "part_kernel", "merge_kernel",
           "rows_kernel", "weights_kernel"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have, CUDA C++ Programming Guide, table 21
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(architecture: int, starts: str, folder: Path) -> list[dict]:
    """What each kernel takes of the GPU; compiled in another process, because this one interprets."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, ROOT / "tests" / "compiled.py", str(architecture), starts, folder],
                         env=variables | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)},
                         capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(rows: list[dict], architecture: int) -> None:
    """Every kernel is there, uses tensor cores and fits."""
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["tensor_cores"] for row in rows if row["kernel"] != "merge_kernel")
    assert [row for row in rows if row["shared"] > SHARED[architecture]] == []


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    check(compiled(90, "small", tmp_path), 90)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_compiles_and_fits_as_it_is_started(architecture, tmp_path):
    check(compiled(architecture, "usual", tmp_path), architecture)
