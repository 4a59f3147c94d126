"""A plan's model that has learned from the dense one: what it learns on, what it is judged from, how it runs."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from sentei.axes import connections, depth, weights
from sentei.budget import distilled
from sentei.budget.judge import Judge, reading
from sentei.budget.workload import Decode
from sentei.conversion import native
from sentei.conversion.plan import Entry, Plan
from sentei.conversion.student import student_of
from sentei.core.rules import Fixed, Threshold, TopK
from sentei.core.storage import Stages
from sentei.kernels.native import missing
from sentei.measurement.text import spare_of, windows_of

EVEN = Plan.everywhere(range(3), "weights", weights.Config(rule=TopK(64), saliency="obs"))
SPARSE = Plan.everywhere(range(3), "connections", connections.Config(rule=Threshold(0.3)))
PAGES = Plan.everywhere(range(3), "connections", connections.Config(decode=Threshold(0.3)))


def test_dense_is_timed_from_its_own_prompt_and_the_healed_model_from_its_own(tmp_path):
    """A model without an attention leaves a layer of its cache empty, which the dense model cannot go on from."""
    plan = Plan((Entry(layer=1, room="depth", config=depth.Config(rule=Fixed(()), part="attention")),))
    windows = {"verify": torch.randint(3, 259, (1, 96), generator=torch.Generator().manual_seed(0))}
    judge = Judge(tiny_model("llama"), Decode(64), windows, Stages(None), {})
    student, _ = student_of(judge.model, plan)
    found = distilled.HealedJudge(judge, student, "key").time(plan, "verify", 1, lambda: None)
    assert len(found.dense) == len(found.pruned) == 1


def test_the_healed_model_runs_natively_whatever_the_rooms(monkeypatch):
    right = native.install
    monkeypatch.setattr(native, "install", lambda model: right(model, most_rows=8, many_rows=9))
    plan = Plan((Entry(layer=1, room="depth", config=depth.Config(rule=Fixed(()), part="attention")),))
    judge = Judge(tiny_model("llama"), Decode(64), {}, Stages(None), {})
    student, _ = student_of(judge.model, plan)
    assert not native.is_installed(student)
    healed = distilled.HealedJudge(judge, student, "key")
    assert native.is_installed(healed.standing(plan)) == (not missing())
    assert healed.standing(Plan()) is judge.model and not native.is_installed(judge.model)


def test_the_text_for_healing_is_all_that_is_not_used_to_judge():
    tokenizer = tiny_tokenizer()
    text = "".join(chr(0x100 + number) for number in range(1500))  # every letter once, of two bytes
    needed, wished = {"calibrate": 1, "choose": 2, "verify": 2}, {"calibrate": 1}
    windows = windows_of(tokenizer, text, length=256, needed=needed, wished=wished)
    assert {use: len(rows) for use, rows in windows.items()} == {"calibrate": 2, "choose": 2, "verify": 2}
    rows = distilled.text_for(tokenizer, text, windows, 64)
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    where = {tuple(stream[start:start + 64]): start for start in range(len(stream) - 63)}
    places = sorted(where[tuple(row)] for row in rows.tolist())
    judged = [where[tuple(row[:64])] for use in ("choose", "verify") for row in windows[use].tolist()]
    assert all(after - before >= 64 for before, after in zip(places, places[1:], strict=False))
    assert all(place + 64 <= start or start + 256 <= place for place in places for start in judged)
    assert len(rows) * 64 > len(stream) - 4 * 256 - 8 * 64
    assert len(spare_of(tokenizer, text, length=256, needed={"one": 11}, size=128)) == 0  # gaps of 18 tokens
    assert len(spare_of(tokenizer, text, length=256, needed={"one": 11}, size=16)) == 10


@pytest.mark.parametrize("plan, felt, context", [(Plan(), False, 256), (PAGES, False, 256), (EVEN, True, 256),
                                                 (SPARSE, True, 2048)], ids=["none", "pages", "even", "sparse"])
def test_windows_are_long_where_attention_is_pruned(plan, felt, context):
    assert bool(reading(plan).entries) == felt
    assert distilled.context_of(plan, 4096) == context and distilled.context_of(plan, 128) == 128


@pytest.mark.parametrize("windows, context, shape", [((2, 512), 256, (2, 512)), ((2, 4096), 256, (2, 1024)),
                                                     ((1, 4096), 256, (1, 2048)), ((3, 4096), 2048, (2, 2048))])
def test_checks_are_bounded_and_no_shorter_than_what_is_healed_on(windows, context, shape):
    assert distilled.checks_of(torch.zeros(windows), context).shape == shape
