"""`sentei bench`: rows as they are measured, no ratio where outputs differ, and a peer that cannot run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from sentei.benches import attention, cold, decode, layers, linear, memory, prompt, topk
from sentei.benches import table as benches
from sentei.benches.attention import Case
from sentei.core.errors import ResourceError, SenteiError
from sentei.measurement.latency import Comparison, measured

KEYS = {"bench", "case", "peer", "ours_s", "peer_s", "ratio", "machine", "low", "high"}


@pytest.fixture
def small(monkeypatch) -> None:
    """Cases of milliseconds; FlexAttention is not compiled, which then reads no tiles, so all of them are kept."""
    monkeypatch.setattr(attention, "CASES", {
        "exact": [Case(2, 1, 8, 130)], "sparse": [Case(2, 2, 8, 256, kept=0.9999)],
        "backward": [Case(4, 2, 8, 130, backward=True)]})
    monkeypatch.setattr(attention, "compiled", lambda: torch.nn.attention.flex_attention.flex_attention)
    monkeypatch.setattr(benches, "PARTS", {})
    monkeypatch.setattr(attention, "LEAST", 0.0)


def measure(*cases: str, absent=print) -> list[dict]:
    return list(benches.rows("attention", list(cases), 2, absent))


def test_a_row_has_the_keys_of_every_bench(small):
    rows = measure()
    assert [row["peer"] for row in rows] == ["torch sdpa", "torch sdpa", "compiled FlexAttention", "torch sdpa"]
    for row in rows:
        assert set(row) == KEYS | {"gflops"} and row["low"] <= row["ratio"] <= row["high"]
        assert row["case"] in benches.line(row) and json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize("kept", [0.125, 0.5, 1.0])
def test_a_share_of_the_blocks_is_that_share_of_the_permitted_ones(kept):
    tiles = Case(4, 2, 8, 1024, kept=kept).tiles
    counts, blocks = (tiles.full_count + tiles.partial_count).sum(-1), 16 * 17 // 2
    assert torch.equal(counts, torch.full((1, 2), max(round(kept * blocks), 16 + 15)))
    assert tiles.mask().diagonal(dim1=-2, dim2=-1).all() and tiles.mask()[..., 0].all()


def test_a_row_is_there_before_the_next_is_measured(small, monkeypatch):
    rows = benches.rows("attention", [], 1, print)
    assert next(rows)["peer"] == "torch sdpa"
    monkeypatch.setattr(attention, "interleave", lambda *_, **__: pytest.fail("measured too early"))
    with pytest.raises(pytest.fail.Exception, match="measured too early"):
        next(rows)


@pytest.mark.parametrize("case", ["exact", "sparse", "backward"])
def test_outputs_that_differ_have_no_ratio(small, monkeypatch, case):
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *given, **named: right(*given, **named) * 1.1)
    with pytest.raises(AssertionError, match="not close"):
        measure(case)


def test_a_peer_that_cannot_be_compiled_is_said_to_be_absent(small, monkeypatch):
    class Failed(BackendCompilerFailed):  # whose own arguments differ between versions of torch
        def __init__(self):
            RuntimeError.__init__(self, "No working C++ compiler found")

    def fail(*given, **named):
        raise Failed

    monkeypatch.setattr(attention, "compiled", lambda: fail)
    told = []
    assert [row["peer"] for row in measure("sparse", absent=told.append)] == ["torch sdpa"]
    assert len(told) == 1 and told[0].startswith("compiled FlexAttention cannot run here: ") and "compiler" in told[0]


def test_a_layer_that_chooses_is_timed_beside_the_peers_or_the_peer_is_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(attention, "CASES", {"layer": [layers.Layer(2, 1, 8, 200, 1)]})
    made, told = [], []

    class SparseAttention(torch.nn.Module):
        def __init__(self, **sizes):
            super().__init__()
            made.append(sizes)

        def forward(self, x):
            return x

    package = "native_sparse_attention_pytorch"
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(SparseAttention=SparseAttention))
    row, = measure("layer")
    assert row["peer"] == layers.PEER and row["case"].startswith("a layer that chooses 1 blocks of 64, 2/1 x 8, 200")
    assert set(row) == KEYS and made[0]["dim"] == 16 and (made[0]["heads"], made[0]["kv_heads"]) == (2, 1)
    layer = layers.Layer(2, 1, 8, 200, 1)
    assert layer.layer.connections.config.rule.k == 1 and layer.ours().shape == layer.x.shape
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(attention, "CASES", {"layer": [layers.Layer(2, 1, 8, 200, 1)]})
    assert measure("layer", absent=told.append) == []
    assert len(told) == 1 and told[0].startswith(f"{layers.PEER} cannot run here: ")


@pytest.mark.parametrize(("given", "error"), [
    (("atention", [], 1),
     "bench: expected one of attention, decode, linear, memory, prompt, rooms, topk, got 'atention'"),
    (("attention", ["exact", "dense"], 1), "bench attention: expected cases of exact, .*, got dense"),
    (("attention", [], 0), "--runs: expected 1 or more, got 0"),
])
def test_what_there_is_not_is_refused(given, error):
    with pytest.raises(SenteiError, match=error):
        next(benches.rows(*given, print))


def test_a_whole_bench_has_the_rows_of_its_parts_and_a_case_of_it_has_not(small, monkeypatch):
    monkeypatch.setattr(benches, "PARTS", {"attention": ("decode",)})
    monkeypatch.setattr(decode, "CASES", {"small": SMALL["decode"][1]})
    assert [row["bench"] for row in measure()] == ["attention"] * 4 + ["decode"] * 2
    assert {row["bench"] for row in measure("exact", "sparse", "backward")} == {"attention"}


def test_a_ratio_is_peer_over_ours_pair_by_pair():
    row = measured("b", "c", "p", Comparison(dense=[3.0, 8.0, 2.0], pruned=[1.0, 2.0, 2.0], date=""), operations=4e9)
    assert (row["ratio"], row["low"], row["high"]) == (3.0, 1.0, 4.0)
    assert (row["peer_s"], row["ours_s"], row["gflops"]) == (3.0, 2.0, 2.0)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_the_verb_prints_a_line_a_row(sentei, small, flags):
    done = sentei("bench", "attention", "exact", "sparse", "--runs", 1, *flags)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == (3 if flags else 4)
    if flags:
        assert all(set(json.loads(line)) >= KEYS for line in lines)
    else:
        assert lines[0].split() == benches.head().split() and "torch sdpa" in lines[1]


GREEDY = """
import torch
from sentei.benches import memory

def greedy(case):
    if case.tokens == 256:  # the call before, whose peak must not count
        return torch.ones(128 << 20).sum()
    held = [torch.ones(8 << 20) for _ in range(3)]
    return held[0] + held[2]

memory.CASES["exact"] = memory.Case(2, 1, 8, 300)
memory.KERNELS["ours"] = greedy
memory.report("exact", "ours")
"""


def test_memory_is_what_a_call_takes_beside_inputs_and_output():
    """A kernel that makes three tensors of 32 MiB and an output as large, after a call that took 512 MiB."""
    done = subprocess.run([sys.executable, "-c", GREEDY], stdout=subprocess.PIPE, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert 0.85 * 96 <= json.loads(done.stdout)["bytes"] / memory.MIB <= 1.15 * 96


SMALL = {
    "topk": (topk, [topk.Case(40, False), topk.Case(40, True)]),
    "linear": (linear, [linear.Case(64, 96, 2, torch.float32), linear.Case(64, 96, 1, torch.bfloat16)]),
    "decode": (decode, [decode.Case(90, torch.float32)]),
    "prompt": (prompt, [prompt.Case(layer, 20, dtype) for layer, dtype in zip(
        prompt.LAYERS, [torch.float32, torch.bfloat16] * 3, strict=True)]),
}


@pytest.mark.parametrize("bench", SMALL)
def test_every_bench_has_rows_of_the_same_keys(bench, monkeypatch):
    module, cases = SMALL[bench]
    monkeypatch.setattr(module, "CASES", {"small": cases})
    monkeypatch.setattr(cold, "size", lambda: 1 << 20)
    monkeypatch.setattr(linear, "TURN", 1 << 16)
    for timed in (topk, decode):
        monkeypatch.setattr(timed, "LEAST", 0.0)
    found = list(benches.rows(bench, [], 2, lambda reason: None))
    assert {row["case"] for row in found} == {str(case) for case in cases}
    for row in found:
        assert set(row) >= KEYS and set(row) - KEYS <= set(benches.MORE) and row["bench"] == bench
        assert 0 < row["ours_s"] < 5 and 0 < row["peer_s"] < 5 and row["low"] <= row["ratio"] <= row["high"]


WRONG = {"topk": "attend_topk", "linear": "torch_linear", "decode": "scaled_dot_product_attention"}


@pytest.mark.parametrize("bench", WRONG)
def test_no_bench_has_a_ratio_where_the_outputs_differ(bench, monkeypatch):
    module, cases = SMALL[bench]
    right = getattr(module, WRONG[bench])

    def wrong(*given, **named):
        made = right(*given, **named)
        return (made[0] * 1.5, *made[1:]) if isinstance(made, tuple) else made * 1.5

    monkeypatch.setattr(module, "CASES", {"small": cases})
    monkeypatch.setattr(cold, "size", lambda: 1 << 20)
    monkeypatch.setattr(module, WRONG[bench], wrong)
    with pytest.raises(AssertionError, match="differ|not close"):
        list(benches.rows(bench, [], 1, lambda reason: None))


@pytest.mark.parametrize("layer", prompt.LAYERS)
@pytest.mark.parametrize("part", [0, -1])
def test_no_layer_of_a_prompt_has_a_ratio_where_the_outputs_differ(layer, part, monkeypatch):
    """One of several results is enough."""
    def wrong(right):
        def made(*given, **named):
            results = right(*given, **named)
            if not isinstance(results, tuple):
                return results * 1.5
            return tuple(result * 1.5 if result is results[part] else result for result in results)
        return made

    monkeypatch.setattr(prompt, "CASES", {"small": [prompt.Case(layer, 20, torch.float32)]})
    for owner, name in ((prompt, "linear"), *((prompt.native, name) for name in ("gated", "norm", "heads"))):
        monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(AssertionError, match="differ"):
        list(benches.rows("prompt", [], 1, lambda reason: None))


@pytest.mark.parametrize(("seconds", "shown"), [(1.2345, "1,234"), (0.0123456, "12.3"), (1.2345e-5, "0.0123")])
def test_times_are_shown_with_three_digits(seconds, shown):
    row = measured("b", "c", "p", Comparison(dense=[seconds], pruned=[seconds], date=""))
    assert benches.cells(row)[2:4] == [shown, shown]


@pytest.mark.parametrize("bench", [attention, topk, decode])
def test_short_calls_are_timed_for_long_enough(bench, small, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "LEAST", 0.25)
    monkeypatch.setattr(bench, "interleave", lambda *_, least=0.0, **__: asked.append(least) or Comparison(
        dense=[1.0], pruned=[1.0], date=""))
    if bench is not attention:
        monkeypatch.setattr(bench, "CASES", {"small": SMALL[bench.__name__.split(".")[-1]][1]})
    list(bench.rows(list(bench.CASES)[:1], 1, print))
    assert asked[0] == 0.25 and set(asked) == ({0.25, 0.0} if bench is decode else {0.25})


def test_of_the_kinds_of_sdpa_the_fastest_is_the_peer(monkeypatch):
    """Clocks that make each later peer faster; then the update."""
    clocks = iter([9.0, 6.0, 3.0, 30.0])
    monkeypatch.setattr(decode, "CASES", {"small": [decode.Case(90, torch.bfloat16)]})
    monkeypatch.setattr(decode, "interleave", lambda *_, **__: Comparison(
        dense=[next(clocks)], pruned=[1.5], date=""))
    attended, updated = benches.rows("decode", [], 1, print)
    assert (attended["peer"], updated["peer"]) == ("torch sdpa, cast to float32", "DynamicLayer.update")
    assert (attended["peer_s"], attended["ours_s"], attended["ratio"]) == (3 / decode.LAYERS, 1.5 / decode.LAYERS, 2.0)
    assert attended["gb_s"] == decode.Case(90, torch.bfloat16).bytes_read() * decode.LAYERS / 1.5 / 1e9


def test_bandwidth_is_the_time_of_reading_by_ours(monkeypatch):
    case = linear.Case(64, 96, 1, torch.float32)
    monkeypatch.setattr(linear, "CASES", {"small": [case]})
    monkeypatch.setattr(linear, "turns", lambda *given: {"ours": [2e-6, 4e-6, 4e-6], "torch": [6e-6, 8e-6, 6e-6],
                                                         "read": [1e-6, 1e-6, 3e-6], "call": [2e-6, 3e-6, 3e-6]})
    row, = benches.rows("linear", [], 3, print)
    assert (row["bandwidth"], row["a_call"], row["ratio"]) == (0.5, 0.75, 2.0)
    assert row["gb_s"] == pytest.approx(64 * 96 * 4 / 1e9 / 1e-6)


def test_a_weight_is_cold_when_its_turn_comes_again(monkeypatch):
    """Every copy is used before one is used twice, and reading goes over the copies themselves."""
    case, used = linear.Case(64, 96, 1, torch.bfloat16), []
    monkeypatch.setattr(cold, "size", lambda: 20 * case.bytes)
    monkeypatch.setattr(linear, "TURN", 2 * case.bytes)
    for name in ("ours", "torch_linear"):
        own = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda x, weight, own=own: used.append(weight.data_ptr()) or own(x, weight))
    read = cold.read
    monkeypatch.setattr(cold, "read", lambda memory: used.extend(
        range(memory.data_ptr(), memory.data_ptr() + memory.nbytes, case.bytes)) or read(memory))
    with torch.no_grad():
        seconds = linear.turns(case, 4)
    assert {name: len(found) for name, found in seconds.items()} == {"ours": 4, "torch": 4, "call": 4, "read": 4}
    used = used[2:]  # that of the comparison
    assert len(used) == 5 * 4 * 2
    for first in range(0, len(used), 20):
        assert len(set(used[first:first + 20])) == 20


@pytest.mark.parametrize(("caches", "memory", "expected"), [
    ({"L1": 48 << 10, "L3": 260 << 20}, 1 << 40, 1040 << 20), ({"L2": 1 << 20}, 1 << 40, 256 << 20),
    ({}, 1 << 30, 256 << 20), ({}, (1 << 30) - 4096, None), ({"L3": 260 << 20}, 4 << 30, None)], ids=str)
def test_cold_memory_is_four_times_the_largest_cache_or_there_is_no_bench(caches, memory, expected, monkeypatch):
    monkeypatch.setattr(cold, "cache_sizes", lambda: caches)
    monkeypatch.setattr(cold.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": memory // 4096}.get)
    if expected:
        assert cold.size() == expected
    else:
        with pytest.raises(ResourceError, match="bench: expected .* MiB of memory, 16 times"):
            cold.size()


def test_reading_reads_all_but_the_last_few_bytes(monkeypatch):
    counts = []
    monkeypatch.setattr(cold.native, "load", lambda: SimpleNamespace(
        sentei_read=lambda at, count, *rest: counts.append((at.value, count.value)) or len(counts) - 1))
    memory = torch.ones(3, 200, dtype=torch.bfloat16)
    cold.read(memory)
    assert counts == [(memory.data_ptr(), 256)]
    with pytest.raises(ResourceError, match="bench: expected memory"):
        cold.read(memory)
