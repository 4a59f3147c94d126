"""A plan is judged on the real model, in turn with dense, and once only."""

import pytest
import torch
from tiny import tiny_model

from sentei.axes.connections import Config
from sentei.budget import judge as module
from sentei.budget.judge import Judge, Judgement, short_key
from sentei.budget.workload import Prefill
from sentei.conversion import wrapper
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Entry, Plan
from sentei.conversion.rooms import WAYS
from sentei.core.rules import All, Threshold
from sentei.core.storage import Stages
from sentei.core.tracing import trace
from sentei.measurement.latency import Comparison
from sentei.measurement.quality import compare, token_losses

WINDOWS = {use: torch.randint(3, 259, (2, 200), generator=torch.Generator().manual_seed(seed))
           for seed, use in enumerate(("choose", "verify"))}


def plan_of(rule, *layers: int) -> Plan:
    config = Config(tile=(16, 16), window=0, rule=rule)
    return Plan(tuple(Entry(layer=layer, room="connections", config=config) for layer in layers))


SPARSE = plan_of(Threshold(0.9), 1)


@pytest.fixture
def judge(tmp_path) -> Judge:
    judge = Judge(tiny_model("llama"), Prefill(200), WINDOWS, Stages(tmp_path), {"model": "tiny"})
    for use in WINDOWS:
        judge.prepare(use, lambda: None)
    return judge


def test_a_plan_that_keeps_everything_loses_nothing(judge):
    found = judge.judge(plan_of(All(), 0, 2), "choose", lambda: None)
    assert found.quality.value == pytest.approx(1.0, abs=1e-5)
    assert set(found.density) == {0, 2} and set(sum(found.density.values(), [])) == {1.0}


def test_what_a_mixture_keeps_of_its_routers_choice_is_counted_as_it_is_judged(tmp_path):
    model = tiny_model("qwen3_moe")
    judge = Judge(model, Prefill(200), WINDOWS, Stages(tmp_path), {"model": "mixture"})
    judge.prepare("choose", lambda: None)
    option = WAYS["experts"].options(layer_of(model, 1), "rule")[2]
    plan = Plan((Entry(layer=1, room="experts", config=option), *SPARSE.entries))
    found = judge.judge(plan, "choose", lambda: None)
    kept, chosen = 0, 0
    with trace(module.convert(model, plan)) as records, torch.no_grad():
        for row in WINDOWS["choose"]:
            model(input_ids=row[None])
    for record in records.at("model.layers.1.mlp.experts.choice"):
        kept, chosen = kept + int(record.selection.count().sum()), chosen + int(record.selection.permitted.sum())
    assert found.experts == {1: pytest.approx(kept / chosen)} and 0.3 < found.experts[1] < 1
    assert set(found.density) == {1} and len(found.density[1]) == 4
    assert judge.judge(plan, "choose", lambda: 1 / 0) == found, "it is remembered"


@pytest.mark.parametrize("use", WINDOWS)
def test_quality_is_against_the_dense_model_on_the_same_windows(judge, use):
    found = judge.judge(SPARSE, use, lambda: None)
    dense = token_losses(tiny_model("llama"), WINDOWS[use])
    model = judge.model
    module.convert(model, SPARSE)
    assert found.quality == compare(dense, token_losses(model, WINDOWS[use]))
    assert all(0 < density < 1 for density in found.density[1]) and found.quality.value != 1


def test_the_model_is_dense_again_whatever_happens(judge, monkeypatch):
    judge.judge(SPARSE, "choose", lambda: None)
    judge.time(SPARSE, "verify", 1, lambda: None)
    assert not wrapper.rooms(judge.model)
    monkeypatch.setattr(judge, "_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judge.judge(plan_of(Threshold(0.4), 1), "choose", lambda: None)
    assert not wrapper.rooms(judge.model)


def test_a_plan_is_judged_once_for_each_use_and_model(judge, tmp_path):
    def steps_of(judge: Judge, plan: Plan, use: str) -> int:
        steps = []
        judge.judge(plan, use, lambda: steps.append(1))
        return len(steps)

    assert steps_of(judge, SPARSE, "choose") == 2
    assert steps_of(judge, SPARSE, "choose") == 0
    assert steps_of(judge, SPARSE, "verify") == 2
    assert steps_of(judge, SPARSE, "choose") == 0, "a use must not push out another"
    assert steps_of(judge, plan_of(Threshold(0.9), 2), "choose") == 2
    again = Judge(judge.model, Prefill(200), WINDOWS, Stages(tmp_path), {"model": "another"})
    again.dense = judge.dense
    assert steps_of(again, SPARSE, "choose") == 2


@pytest.fixture
def calls(judge, monkeypatch) -> list:
    """The attention of every timed run, and what the model was called with; it does no work, each time faster."""
    seen = []
    monkeypatch.setattr(judge.workload.__class__, "begin", lambda self, model, row, opening: lambda: seen.append(
        (model.config._attn_implementation, row)) or [1 / len(seen)])
    return seen


def test_dense_and_pruned_are_timed_each_with_its_own_attention(judge, calls):
    found = judge.time(SPARSE, "verify", 1, lambda: None)
    assert [name for name, _ in calls] == [wrapper.IMPLEMENTATION, "sdpa", "sdpa", wrapper.IMPLEMENTATION]
    assert len(found.dense) == 1 and all(torch.equal(row, WINDOWS["verify"][0]) for _, row in calls)


def test_what_timed_runs_begin_with_is_made_once_by_the_dense_model(judge, calls, monkeypatch):
    made = []
    monkeypatch.setattr(judge.workload.__class__, "opening", lambda self, model, row: made.append(
        (model.config._attn_implementation, row)))
    for plan in (SPARSE, Plan(), SPARSE):
        judge.run("verify").begin(plan)
    (implementation, row), = made
    assert implementation == "sdpa" and torch.equal(row, WINDOWS["verify"][0])


def test_the_empty_plan_is_timed_as_dense_alone(judge, calls):
    judge.time(Plan(), "verify", 1, lambda: None)
    assert [name for name, _ in calls] == ["sdpa", "sdpa"]


def test_seconds_of_a_plan_are_those_of_one_run_with_it_and_measured_once(judge, calls):
    steps = []
    for plan, least in ((Plan(), 1 / 2), (SPARSE, 1 / 4), (SPARSE, 1 / 4)):
        assert judge.seconds(plan, "verify", lambda: steps.append(1)) == least
    assert [name for name, _ in calls] == ["sdpa"] * 2 + [wrapper.IMPLEMENTATION] * 2 and len(steps) == 2
    assert not wrapper.rooms(judge.model)


def test_another_workload_is_judged_anew(judge, tmp_path):
    other = Judge(judge.model, Prefill(100), WINDOWS, Stages(tmp_path), {"model": "tiny"})
    steps = []
    other.prepare("choose", lambda: steps.append(1))
    assert len(steps) == 2


def test_layers_the_plan_does_not_name_count_as_whole():
    quality = compare(torch.zeros(2, 1), torch.zeros(2, 1))
    assert Judgement(quality=quality, density={1: [0.25, 0.75]}).mean_density((0, 1)) == pytest.approx(0.75)


def test_different_plans_have_different_keys():
    plans = [Plan(), SPARSE, plan_of(Threshold(0.9), 2), plan_of(Threshold(0.4), 1)]
    assert len({short_key(plan) for plan in plans}) == 4 and all(len(short_key(plan)) == 16 for plan in plans)


def test_a_plan_that_prunes_nothing_is_as_fast_as_dense_whatever_the_clock_says(judge, monkeypatch):
    monkeypatch.setattr(module, "interleave", lambda *_, **__: Comparison(dense=[2.0], pruned=[1.0], date="today"))
    assert judge.time(Plan(), "verify", 1, lambda: None).ratios() == [1.0]
    assert judge.time(SPARSE, "verify", 1, lambda: None).ratios() == [2.0]
