"""Malformed calls of the native entries raise errors; they never end the process, hang it or give a wrong shape."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import malformed
import pytest
import torch

from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
SCRIPT = Path(malformed.__file__)
OPS = "sys.modules['sentei'].kernels"
CALLS = 800  # enough for every entry and every damage


def run(first: int, count: int, before: str = "") -> subprocess.CompletedProcess:
    """The calls in a process of their own; `before` is code that runs first."""
    code = f"import sys, malformed\n{before}\nsys.exit(malformed.main({first}, {count}))"
    path = os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.parent)))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=590,
                          env={**os.environ, "PYTHONPATH": path})


def check(done: subprocess.CompletedProcess, count: int) -> None:
    """Fails with the calls that were accepted and, after a crash, the number of the one that was not answered."""
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if " WRONG " in line]
    assert done.returncode == 0 and len(lines) == count, (
        f"exit {done.returncode} after {lines[-1:]}, wrong: {wrong[:10]}\n{done.stderr[:2000]}")


def test_malformed_calls_raise_and_never_crash():
    check(run(0, CALLS), CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 2500))
def test_so_do_ten_thousand(first):
    check(run(first, 2500), 2500)


@pytest.mark.parametrize("family", malformed.FAMILIES, ids=lambda family: family[0].__module__)
def test_a_call_that_fits_is_answered(family):
    """Else refusals would say nothing."""
    valid, entries, _ = family
    for seed in range(20):
        torch.manual_seed(seed)
        given = valid(Random(seed))
        for entry in entries:
            found, shapes = entry(given)
            assert [[*tensor.shape] for tensor in found] == shapes, (seed, entry)


def test_every_entry_and_every_damage_is_drawn():
    calls = [malformed.drawn(number) for number in range(CALLS)]
    for _, entries, damages in malformed.FAMILIES:
        assert set(entries) <= {entry for entry, *_ in calls}
        done = {told.split()[0] for entry, _, all_done, _ in calls if entry in entries for told in all_done}
        assert done == {damage.__name__ for damage in damages}


@pytest.mark.parametrize(("before", "seen"), [
    ("malformed.fused_cpp._finish = lambda *_: None", r"accepted \w+: other_(ids|counts)"),
    ("malformed.fused_cpp.Grid.check = lambda *_: None", "exit"),
    pytest.param(f"{OPS}.topk.fused_cpp._check_backward = lambda *_: None", "exit", marks=pytest.mark.slow),
    pytest.param(f"{OPS}.paging.fused_cpp._check = lambda *_: None", "exit", marks=pytest.mark.slow),
    pytest.param(f"{OPS}.linear.fused_cpp._check = lambda *_: None", "exit", marks=pytest.mark.slow),
    pytest.param(f"{OPS}.routing.fused_cpp._check = lambda *_: None", "exit", marks=pytest.mark.slow),
    (f"{OPS}.linear.rows._layer_fits = lambda *_: True", "accepted|exit -|AddressSanitizer|runtime error"),
    (f"{OPS}.block._plain = lambda *_: True", "accepted layer|exit -|AddressSanitizer|runtime error"),
    (f"{OPS}.block.numbers_of = lambda rule: (0, 0.0)", "shapes .* for layer"),
    pytest.param(f"{OPS}.block._cache_fits = lambda *_: True", "accepted layer|exit -|AddressSanitizer|runtime error",
                 marks=pytest.mark.slow),
    pytest.param("malformed.fused_cpp._check_keep = lambda *_: None", "exit", marks=pytest.mark.slow),
    ("malformed.outcome = lambda _: __import__('ctypes').string_at(0)", r"exit (-11|1) after \['1200 '\]"),
    ("malformed.public.__globals__['attend'] = lambda q, *_, **__: (q, q)", "accepted public"),
], ids=["what plans are answered", "tensors", "top-k's gradients", "pages", "weights", "experts", "layers", "dtypes",
        "rules", "caches", "scores", "crash", "accepts everything"])
def test_a_missing_guard_is_seen(before, seen):
    with pytest.raises(AssertionError, match=seen):
        check(run(1200, 400, before), 400)
