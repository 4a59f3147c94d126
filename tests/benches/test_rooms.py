"""`sentei bench rooms`: every room's rows, and no ratio where outputs differ or a peer is missing."""

import importlib.util

import pytest
import torch

from sentei.benches import cold, depth, experts, heads, lora, rooms, soft
from sentei.benches import table as benches
from sentei.measurement.latency import Comparison

KEYS = {"bench", "case", "peer", "ours_s", "peer_s", "ratio", "machine", "low", "high"}
EXPERTS = {"experts": 4, "inner": 16, "top": 2, "width": 16, "dtype": torch.float32}
SMALL = {
    "experts": (experts, [experts.Case(**EXPERTS, tokens=70, backward=True), experts.Case(**EXPERTS, tokens=2,
                                                                                         backward=False)]),
    "depth": (depth, [depth.Case(0.5, train, width=64, batch=2, tokens=96) for train in (True, False)]),
    "heads": (heads, [heads.Case(groups, 600, torch.float32) for groups in (8, 2)]),
    "lora": (lora, [lora.Case("step", 2, 8, 4), lora.Case("forward", 1, 1, 4)]),
    "soft": (soft, [soft.Case(2, 16, 12)]),
}
PEERS = {"experts": [{"eager", "grouped_mm"}, {"eager", "grouped_mm", "batched_mm"}],
         "depth": [{"the dense block", "the block alone on what is kept"}] * 2,
         "heads": [{"torch sdpa"}, {"torch sdpa", "8/8, MHA"}], "lora": [{"PEFT"}] * 2, "soft": [{"soft-moe-pytorch"}]}
PACKAGE = {"lora": "peft", "soft": "soft_moe_pytorch"}
# What a bench compares, and by how much a wrong one is off.
WRONG = {"experts": (experts, "route"), "depth": (depth, "dense"), "heads": (heads, "sdpa"), "lora": (lora, "loss_of"),
         "soft": (soft, "step")}


@pytest.fixture
def small(request, monkeypatch) -> str:
    """Cases of milliseconds of one room alone."""
    name = request.param
    if name in PACKAGE and importlib.util.find_spec(PACKAGE[name]) is None:
        pytest.skip(f"{PACKAGE[name]} is not installed")
    module, cases = SMALL[name]
    monkeypatch.setattr(module, "CASES", {"small": cases})
    monkeypatch.setattr(rooms, "CASES", module.CASES)
    for other in rooms.PARTS:
        if other is not module:
            monkeypatch.setattr(other, "CASES", {})
    monkeypatch.setattr(cold, "size", lambda: 1 << 18)
    monkeypatch.setattr(lora, "SIZES", lora.SIZES | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                                                     "num_hidden_layers": 1, "num_attention_heads": 2,
                                                     "num_key_value_heads": 1})
    return name


@pytest.mark.parametrize("small", SMALL, indirect=True)
def test_every_room_has_rows_of_the_bench(small):
    found = list(benches.rows("rooms", ["small"], 2, lambda reason: None))
    cases = SMALL[small][1]
    assert [{row["peer"] for row in found if row["case"] == str(case)} for case in cases] == PEERS[small]
    for row in found:
        assert set(row) >= KEYS and set(row) - KEYS <= set(benches.MORE) and row["bench"] == "rooms"
        assert 0 < row["ours_s"] < 5 and 0 < row["peer_s"] < 5 and row["low"] <= row["ratio"] <= row["high"]
        assert row["case"] in benches.line(row)


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_experts_that_calls_read_are_more_than_the_caches_hold_and_none_comes_twice(tokens, monkeypatch):
    monkeypatch.setattr(cold, "size", lambda: 1 << 18)
    case = experts.Case(experts=16, inner=16, top=3, width=16, tokens=tokens, backward=False, dtype=torch.float32)
    subject, read = experts.Subject(case), []
    monkeypatch.setattr(experts, "route", lambda hidden, ids, weights, stack: read.append(
        [(id(stack), expert) for expert in ids.unique().tolist()]))
    for number in range(subject.calls):
        subject.ours(number)
    chosen = len(subject.ids.unique())
    assert all(len(one) == chosen for one in read) and len(subject.choices) == 16 // chosen
    everything = [expert for one in read for expert in one]
    assert len(everything) == len(set(everything)) and len(everything) * case.bytes >= 1 << 18
    for ids in subject.choices:
        assert all(len(row.unique()) == 3 for row in ids)
    theirs = subject.theirs("eager", 5)
    monkeypatch.undo()
    torch.testing.assert_close(theirs, subject.ours(5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", SMALL, indirect=True)
def test_no_room_has_a_ratio_where_the_outputs_differ(small, monkeypatch):
    module, name = WRONG[small]
    right, calls = getattr(module, name), iter(range(10_000))

    def wrong(*given, **named):
        made = right(*given, **named)
        factor = 1 + next(calls) / 2  # each call is off by more than the one before
        return (lambda: tuple(part * factor for part in made())) if callable(made) else made * factor

    monkeypatch.setattr(module, name, wrong)
    if small in ("depth", "heads"):  # called once: the other side is the room itself
        next(calls)
    with pytest.raises(AssertionError, match="differ|not close"):
        list(benches.rows("rooms", ["small"], 1, lambda reason: None))


@pytest.mark.parametrize("small", ["heads"], indirect=True)
def test_the_share_is_of_the_cache_and_what_is_over_of_the_time(small, monkeypatch):
    """Clocks by which 2 of 8 heads take half of the time: twice their share."""
    monkeypatch.setattr(heads, "interleave", lambda theirs, ours, runs: Comparison(
        dense=[2.0], pruned=[1.0], date=""))
    mha, = [row for row in benches.rows("rooms", ["small"], 1, print) if row["peer"] == "8/8, MHA"]
    assert mha["share"] == 0.25 and mha["ratio"] == pytest.approx(2) and mha["over"] == pytest.approx(1)
    assert mha["gb_s"] == pytest.approx(2 * 600 * 2 * 64 * 4 / mha["ours_s"] / 1e9)
