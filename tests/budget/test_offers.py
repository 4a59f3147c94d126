"""What an option costs and saves, measured on the model itself."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from sentei import pipeline
from sentei.axes.connections import Config
from sentei.budget import offers as module
from sentei.budget import prices
from sentei.budget.calibration import Library
from sentei.budget.judge import Judge, takes_attention
from sentei.budget.offers import Offer, Ruler, candidates, from_json, measure, to_json
from sentei.budget.slack import LayerSlack, Option, whole_plan
from sentei.budget.solver import Timed
from sentei.budget.workload import workload_of
from sentei.conversion import native, wrapper
from sentei.conversion.families import FAMILIES, MIXTURES
from sentei.conversion.layers import originals
from sentei.conversion.native import is_installed
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.progress import Silent
from sentei.core.rules import All, Threshold
from sentei.core.storage import Stages
from sentei.measurement.quality import PERPLEXITY

TOKENS = torch.randint(3, 259, (2, 80), generator=torch.Generator().manual_seed(1))


class Interrupted(Exception):
    """Far enough."""


def stopped(*_):
    raise Interrupted


def test_options_are_priced_on_text_that_nothing_was_fitted_to(monkeypatch, tmp_path):
    """By `sentei slack` and by `sentei prune`; an option that saves nothing has no price."""
    windows, seen = {"calibrate": TOKENS[:1], "choose": TOKENS[1:], "verify": TOKENS[1:]}, []

    def priced(judge, tokens, whole, **_):
        seen.append(tokens)
        return [Offer(entry=entry, part=part, nats=None, seconds=1e-3) for entry, part in candidates(
            judge.model, "rule", ("weights",))]

    monkeypatch.setattr(module, "measure", priced)
    table = prices.measure(tiny_model("llama"), workload_of("prefill:80"), windows, Silent())
    assert {row["perplexity_per_millisecond"] for row in table["options"] if row["room"] == "weights"} == {None}
    monkeypatch.setattr(pipeline, "_windows", lambda *_: windows)
    monkeypatch.setattr("sentei.budget.chooser.solve", stopped)
    (tmp_path / "text").write_text("words " * 100)
    with pytest.raises(Interrupted):
        pipeline.prune(tiny_model("llama"), tiny_tokenizer(), workload="prefill:80", text=tmp_path / "text")
    assert [torch.equal(tokens, TOKENS[1:]) for tokens in seen] == [True, True]


def test_rules_of_connections_that_save_less_than_seconds_vary_by_have_no_price():
    options = [Option(rule=All(), density=[1.0], error=[0.0], seconds=1.0),
               Option(rule=Threshold(0.01), density=[0.9], error=[0.0], seconds=0.9),
               Option(rule=Threshold(0.1), density=[0.4], error=[0.1], seconds=0.4)]
    timed = Timed(slack=LayerSlack(layer=0, options=options), fixed=0.0, per_density=1.0, whole_seconds=1.0)
    rows = prices._connections(timed, workload_of("prefill:80"), 2.0, 0.2)
    assert [row["nats"] for row in rows] == [None, pytest.approx(0.2)]
    assert [row["milliseconds"] for row in rows] == [pytest.approx(100), pytest.approx(600)]


TIMES = {"": 1.0, "weights": 0.7, "depth": 0.4, "experts": 0.9, "heads": 1.1}


def judge_of(family: str, workload: str) -> Judge:
    model = tiny_model(family)
    work = workload_of(workload)
    return Judge(model, work, {"calibrate": TOKENS, "choose": TOKENS}, Stages(None), {},
                 Library(model, TOKENS, work.lever))


@torch.no_grad()
def divergence(model, dense) -> float:
    p, q = (found(input_ids=TOKENS[:1], use_cache=False).logits[0].double().log_softmax(-1) for found in (dense, model))
    return float((p.exp() * (p - q)).sum(-1)[-96:].mean())


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_the_cost_is_the_divergence_of_the_whole_model_from_whichever_layer_it_is_run(family):
    judge, dense = judge_of(family, "prefill:80"), tiny_model(family)
    ruler = Ruler(judge.model, TOKENS[:1], PERPLEXITY)
    assert ruler.nats(0) == ruler.nats(2) == pytest.approx(0, abs=1e-6)
    for entry, _ in candidates(judge.model, "rule"):
        plan = Plan((entry,))
        convert(judge.model, plan, judge.statistics(plan))
        assert ruler.nats(entry.layer) == pytest.approx(divergence(judge.model, dense), rel=1e-3, abs=1e-6)
    assert not any("forward" in vars(layer) for layer in judge.model.model.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("workload", ["prefill:80", "decode:80"])
def test_every_option_has_an_offer_and_the_model_is_dense_again(workload, family):
    judge, steps = judge_of(family, workload), []
    whole = whole_plan(judge.workload, prunable_layers(judge.model), Config())
    found = measure(judge, TOKENS, whole, step=lambda: steps.append(1))
    assert [(offer.entry, offer.part) for offer in found] == candidates(judge.model, judge.workload.lever)
    assert len(steps) == len(found) and all(offer.seconds > 0 < offer.nats for offer in found if offer.pays)
    assert {offer.entry.room for offer in found} >= {"weights", "depth"}
    assert not originals(judge.model) and from_json(to_json(found)) == found


def test_savings_are_of_one_layer_by_the_clock(monkeypatch):
    """The runs of an option in every layer that has it, against none; the first run of none is late."""
    judge, asked = judge_of("llama", "decode:80"), []
    whole = whole_plan(judge.workload, (0, 1, 2), Config())

    class Run:
        def least(self, plan):
            asked.append(plan)
            rooms = {entry.room for entry in plan.entries} - {"connections"}
            return TIMES[min(rooms, default="")] + (5.0 if len(asked) == 1 else 0.0)

    monkeypatch.setattr(judge, "run", lambda use: Run())
    for offer in measure(judge, TOKENS, whole):
        layers = 2 if offer.entry.room == "depth" and offer.part == "attention" else 3
        assert offer.seconds == pytest.approx((1 - TIMES[offer.entry.room]) / layers)
        assert offer.pays == (offer.entry.room != "heads"), "what saves nothing has no price"
    assert asked[0] == asked[-1] == asked[-2] == whole
    for plan in asked[1:-2]:
        kept = {entry.layer for entry in plan.entries if entry.room == "connections"}
        gone = {entry.layer for entry in plan.entries if takes_attention(entry)}
        assert kept ^ gone == {0, 1, 2}, "attention that is left has its room"


@pytest.mark.parametrize("kept, pays", [((6.0, 1.0, 1.0), True), ((6.0, 1.05, 1.0), False), ((1.0, 1.05, 1.9), False)],
                         ids=["one late", "they vary", "late twice"])
def test_what_saves_less_than_timing_varies_by_saves_nothing(monkeypatch, kept, pays):
    judge, left = judge_of("llama", "decode:80"), list(kept)
    whole = whole_plan(judge.workload, (0, 1, 2), Config())

    class Run:
        def least(self, plan):
            return left.pop(0) if plan == whole else 0.96

    monkeypatch.setattr(judge, "run", lambda use: Run())
    assert {offer.pays for offer in measure(judge, TOKENS, whole, ("weights",))} == {pays} and not left


@pytest.mark.parametrize("pruned, kept, pays", [((1.0, 1.0, 9.0), (2.0, 2.5, 2.2), True),
                                                ((1.9, 1.9, 1.9), (2.0, 2.5, 2.2), False),
                                                ((1.9, 2.1, 2.2), (2.0, 2.0, 2.0), False)])
def test_so_it_is_for_prompts(monkeypatch, pruned, kept, pays):
    judge, times = judge_of("llama", "prefill:80"), []
    monkeypatch.setattr(module, "_quickest", lambda work: times.pop(0))
    whole = whole_plan(judge.workload, (0, 1, 2), Config())
    times += [second for cut, own in zip(pruned, kept, strict=True) for second in (own, cut)]  # of one width
    assert {offer.pays for offer in measure(judge, TOKENS, whole, ("weights",))} == {pays} and not times


@pytest.mark.parametrize("workload", ["prefill:80", "decode:80"])
def test_layers_of_each_kind_have_a_time_of_their_own(monkeypatch, workload):
    """Of Gemma's three tiny layers the middle one has full attention, where heads save twice as much."""
    judge = judge_of("gemma3_text", workload)
    whole, saves = whole_plan(judge.workload, (1,), Config()), {0: 1.0, 1: 2.0, 2: 1.0}

    class Run:
        def least(self, plan):
            return 10.0 - sum(saves[entry.layer] for entry in plan.entries if entry.room == "heads")

    def clocked(work):
        block, layers = work.__defaults__[0], list(judge.model.model.layers)
        return 10.0 - (saves[layers.index(block)] if originals(judge.model) else 0.0)

    monkeypatch.setattr(judge, "run", lambda use: Run())
    monkeypatch.setattr(module, "_quickest", clocked)
    found = measure(judge, TOKENS, whole, ("heads",))
    assert {offer.entry.layer: offer.seconds for offer in found} == saves


def test_an_option_for_prompts_is_timed_in_a_layer_of_a_model_that_keeps_all_natively(monkeypatch):
    judge, seen, right = judge_of("llama", "prefill:80"), [], native.install
    monkeypatch.setattr(native, "install", lambda model: right(model, most_rows=8, many_rows=9))
    whole = whole_plan(judge.workload, (0, 1, 2), Config())

    def clocked(work):
        work()
        seen.append((len(wrapper.rooms(judge.model)), len(originals(judge.model)), is_installed(judge.model)))
        late = 7.0 if len(seen) <= (keys + 1) else 0.0  # in the first round
        return late + (1.5 if originals(judge.model) else 2.0)

    entries = [entry for entry, _ in candidates(judge.model, "rule")]
    keys = len({(entry.room, entry.config) for entry in entries})
    monkeypatch.setattr(module, "_quickest", clocked)
    offers = measure(judge, TOKENS, whole)
    assert all(offer.seconds == 0.5 for offer in offers), "the least of each: what else runs here only ever adds"
    assert len(seen) == module.RUNS * (keys + 1), "in each round none once, and every option once"
    kept = [each for place, each in enumerate(seen) if place % (keys + 1) == 0]
    pruned = [each for place, each in enumerate(seen) if place % (keys + 1)]
    assert set(kept) == {(3, 0, True)} and {rooms for rooms, *_ in pruned} == {2, 3}
    assert all(swapped and native for _, swapped, native in pruned)


def test_the_quickest_of_many_short_runs_counts_and_a_long_one_is_done_once(monkeypatch):
    now, left = [0.0], [0.09, 0.03, 0.05, 0.04]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += left.pop(0)

    assert module._quickest(work) == 0.03 and not left
    left[:] = [5.0, 1.0]
    assert module._quickest(work) == 5.0 and left == [1.0]
