"""The pure parts of benchmarks/gpu_check.py, on tiny shapes in Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_routing
from benchmarks.gpu_check import (
    Case,
    correctness,
    decode_correctness,
    errors,
    milliseconds,
    mixture_correctness,
    page,
    perform,
    speed,
)

TINY = Case(heads=2, groups=1, width=16, tokens=40, dtype=torch.float32, kept=0.5, block=16, backward=True,
            device="cpu")
DECODED = replace(TINY, tokens=70, block=8, backward=False)


@pytest.mark.parametrize("change", [{}, {"kept": None}, {"window": 20}, {"kept": None, "window": 9, "softcap": 2.0}],
                         ids=str)
@pytest.mark.parametrize("impl", ["fused_triton", "eager"])
def test_a_right_kernel_is_said_to_be_right(change, impl):
    row = correctness(replace(TINY, **change), impl)
    assert row["right"] and list(row["errors"]) == ["output", "lse", "dq", "dk", "dv"]


@pytest.mark.parametrize("part", range(5))
def test_a_wrong_result_is_said_to_be_wrong(part):
    true = [torch.ones(3, dtype=torch.float64)] * 5
    got = [tensor.float() for tensor in true]
    assert all(error <= allowed for error, allowed in errors(got, got, true).values())
    for wrong in (got[part] * 1.001, got[part] * torch.nan):
        found = errors([wrong if place == part else one for place, one in enumerate(got)], got, true)
        assert [error <= allowed for error, allowed in found.values()] == [place != part for place in range(5)]


def test_decoding_is_checked(monkeypatch):
    from sentei.kernels.attention import triton_pages

    assert decode_correctness(replace(DECODED))["right"]
    right = triton_pages.attend_pages
    monkeypatch.setattr(triton_pages, "attend_pages", lambda *tensors, scale, page: right(
        *tensors, scale=1.1 * scale, page=page))
    assert not decode_correctness(replace(DECODED))["right"]


def test_experts_are_checked_and_timed(monkeypatch):
    tiny = gpu_routing.Mixture(experts=3, inner=5, top=2, width=8, tokens=9, dtype=torch.float32, device="cpu")
    row = mixture_correctness(replace(tiny))
    assert row["right"] and list(row["errors"]) == list(gpu_routing.NAMES)
    torch.testing.assert_close(tiny.theirs("eager")(), tiny.run("fused_triton")())
    row = speed(replace(tiny, backward=False), "experts", "eager", 2)
    assert row["tflops"] > 0 and "## experts" in "".join(page([row], []))
    right = gpu_routing.Mixture.output
    monkeypatch.setattr(gpu_routing.Mixture, "output", lambda case, impl, leaves: right(case, impl, leaves) * (
        1.001 if impl == "fused_triton" else 1))
    assert not mixture_correctness(replace(tiny))["right"]


def test_the_plan_keeps_its_share_and_the_diagonal():
    case = replace(TINY, tokens=16 * 60, kept=0.125)
    mask = case.tiles.mask()
    permitted = torch.ones(60, 60, dtype=torch.bool).tril()
    assert abs(mask[..., permitted].float().mean() - 0.125) < 0.001 and mask[..., 0].all()
    assert mask.diagonal(dim1=-2, dim2=-1).all() and not mask.triu(1).any()
    whole = replace(TINY, tokens=16 * 60, kept=None)
    assert whole.operations() == 4 * 16 * (60 * 60 / 2) * 2 * 16 ** 2  # causal: half of the square


def test_both_are_timed_as_often_and_in_turn():
    calls = []
    pairs = milliseconds(lambda: calls.append("ours"), lambda: calls.append("peer"), 4)
    assert len(pairs) == 4 and all(time > 0 for pair in pairs for time in pair)
    assert calls == ["ours", "peer"] * 2 + ["ours", "peer", "peer", "ours"] * 2


def test_rows_are_printed_and_published_and_what_was_not_done_is_listed(capsys):
    times = speed(replace(TINY, backward=False), "sparse", "sdpa", 2)
    wrong = correctness(TINY, "eager") | {"right": False}
    now = iter([0, 0, 0, 0, 9])
    todo = [("a", "eager", lambda: times), ("b", "eager", lambda: wrong), ("c", "eager", lambda: 1 / 0),
            ("d", "flex", lambda: correctness(TINY, "flex")), ("e", "x", lambda: 1 / 0)]
    rows, skipped = perform(todo, 5, lambda: next(now))
    assert rows == [times, wrong]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert skipped[0] == "c: eager is wrong" and skipped[2] == "e: no time was left"
    assert "tensors that want gradients, on the CPU" in skipped[1]
    text = "\n\n".join(page(rows, skipped))
    assert "**wrong**" in text and "## sparse Goal on an H100: at least 1.3 times" in text and "- c: eager" in text


def test_every_kind_of_job_is_there():
    names = [name for name, _, _ in gpu_check.jobs(1)]
    assert len(set(names)) == len(names)
    for start in ("correctness of 64 x 512, top 6", "experts against grouped_mm", "correctness of decode",
                  "correctness of FlexAttention", "sparse against FlexAttention", "decode: ",
                  "sparse against sdpa", "exact against sdpa", "backward against FlexAttention",
                  "window against FlexAttention", "correctness of exact, a window of 300, 32/8",
                  "correctness of 30 % of the blocks of 64, a window of 500, soft cap 30"):
        assert any(name.startswith(start) for name in names), start


def test_without_a_gpu_it_refuses_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "write_result", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 4
    assert "expected a GPU that torch can use" in capsys.readouterr().err


@pytest.mark.gpu
def test_everything_is_right_on_this_gpu():
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], env=variables, cwd=Path(__file__).parents[1])
    assert run.returncode == 0
