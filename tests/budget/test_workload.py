"""What a workload reads, and what it times."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from torch.testing import assert_close

from sentei.axes.connections import Config
from sentei.axes.depth import Config as Depth
from sentei.axes.experts import Config as Experts
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget import slack, workload
from sentei.budget.calibration import calibrate
from sentei.budget.judge import Judge
from sentei.budget.workload import Decode, Prefill, Workload, workload_of
from sentei.conversion import cache
from sentei.conversion.plan import Entry, Plan, convert, prunable_layers, wanted
from sentei.core.errors import SenteiError
from sentei.core.rules import All, Fixed, Threshold, TopK
from sentei.core.storage import Stages
from sentei.measurement.quality import compare, losses_after, token_losses

FAMILIES = [("llama", {}), ("gemma3_text", {}), ("mistral", {})]
NEAR = Config(window=0)


def row_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (tokens,), generator=torch.Generator().manual_seed(seed))


def paged(model, ratio: float, config: Config = NEAR) -> Plan:
    return Plan.everywhere(prunable_layers(model), "connections", replace(config, decode=Threshold(ratio)))


@pytest.mark.parametrize("text", ["prefill:2", "prefill:4096", "decode:8", "decode:8000"])
def test_a_workload_is_written_as_it_is_read(text):
    assert str(workload_of(text)) == text


@pytest.mark.parametrize("text", ["prefill:1", "prefill:", "prefill:4k", "decode:7", "decode", "write:64",
                                  " prefill:64", "decode:64 ", "prefill:9999999999"])
def test_a_workload_that_is_none_is_refused(text):
    with pytest.raises(SenteiError, match="--workload: expected prefill:TOKENS with at least 2 tokens or "
                                          "decode:TOKENS with at least 8 tokens"):
        workload_of(text)


@pytest.mark.parametrize("family, overrides", FAMILIES, ids=[name for name, _ in FAMILIES])
@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_losses_after_a_cache_are_those_of_one_pass(family, overrides, rows):
    model, row = tiny_model(family, **overrides), row_of(150)
    prefix = Decode(150).prefix(model, row)
    assert prefix.get_seq_length() == 75
    found = losses_after(model, row, prefix, rows=rows)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert_close(found, token_losses(model, row[None])[0, 75:], rtol=1e-4, atol=1e-5)
    assert prefix.get_seq_length() == 149, "the last token is foretold and not read"


@pytest.mark.parametrize("family, merge", [("llama", "joint"), ("qwen2", "joint"), ("qwen3", "joint"),
                                           ("llama", "mean"), ("qwen3", "mean")])
def test_a_model_of_fewer_heads_folds_the_prefix_of_the_dense_one(family, merge):
    """In the first layer, whose keys and values are the same whoever reads, that is what it would have kept itself."""
    model, row, workload = tiny_model(family, num_key_value_heads=4), row_of(80), Decode(80)
    prefix = workload.prefix(model, row)
    merged = Plan.everywhere([0], "heads", Heads(num_kv_heads=2, merge=merge))
    convert(model, merged, calibrate(model, row[None], wanted(merged)))
    own, folded = workload.prefix(model, row), workload._own(model, row, prefix)
    for part in ("keys", "values"):
        assert_close(getattr(folded.layers[0], part), getattr(own.layers[0], part), rtol=1e-4, atol=1e-4)
        assert torch.equal(getattr(folded.layers[2], part), getattr((own if family == "qwen3" and merge == "mean"
                                                                     else prefix).layers[2], part))
    workload.begin(model, row, prefix)()
    workload.sample(model, row, prefix)
    assert len(workload.answer(model, row, prefix)) == 39
    assert [layer.keys.shape[1] for layer in prefix.layers] == [4, 4, 4] and prefix.get_seq_length() == 40


@pytest.mark.parametrize("tokens", [8, 9, 64, 150])
def test_a_prefix_serves_any_number_of_readings(tokens):
    model, row, work = tiny_model("gemma3_text"), row_of(tokens), Decode(tokens)
    prefix = work.prefix(model, row)
    length = prefix.get_seq_length()
    first = work.answer(model, row, prefix)
    work.begin(model, row, prefix)()
    work.sample(model, row, prefix)
    assert prefix.get_seq_length() == length and torch.equal(work.answer(model, row, prefix), first)
    assert len(first) == tokens - length - 1 and torch.isfinite(first).all()


@pytest.mark.parametrize("family, overrides", FAMILIES, ids=[name for name, _ in FAMILIES])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_quality_is_read_as_one_token_at_a_time_would(family, overrides, ratio):
    model, row, work = tiny_model(family, **overrides), row_of(300), Decode(300)
    prefix = work.prefix(model, row)
    dense = work.answer(model, row, prefix)
    convert(model, paged(model, ratio))
    found = work.answer(model, row, prefix)
    assert_close(found, losses_after(model, row, copy.deepcopy(prefix), rows=1), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, dense, atol=1e-4) == (ratio == 0)


@pytest.mark.parametrize("tokens, steps", [(8, 3), (64, 31), (65, 31), (66, 32), (300, 32)])
@pytest.mark.parametrize("ratio", [None, 0.5], ids=["dense", "pruned"])
@pytest.mark.parametrize("whole", [True, False], ids=["opening", "less"])
def test_what_is_timed_is_one_token_at_a_time_with_a_fresh_cache_that_ends_at_the_length(monkeypatch, tokens, steps,
                                                                                       ratio, whole):
    model, row, work = tiny_model("llama"), row_of(tokens), Decode(tokens)
    opening, caches = (work.opening if whole else work.prefix)(model, row), []
    own, read = opening.get_seq_length(), []
    assert own == (tokens - steps - 1 if whole else tokens - tokens // 2)
    if ratio is not None:
        convert(model, paged(model, ratio))
    forward, calls = model.forward, []

    def noted(**inputs):
        calls.append((inputs["input_ids"], inputs["past_key_values"].get_seq_length(), inputs["past_key_values"]))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", noted)
    model.model.register_forward_pre_hook(lambda _, inputs, named: read.append(named["input_ids"].shape[1]),
                                          with_kwargs=True)
    for _ in range(2):
        read.clear()
        run = work.begin(model, row, opening)
        assert sum(read) == tokens - steps - own and (len(read) == 1 or not whole), "nothing is read again"
        assert len(calls) == 1, "one step comes before those that are timed"
        assert len(run()) == steps, "the seconds of each"
        before, *timed = calls
        assert len(timed) == work.timed_tokens == work.timed_runs == steps
        assert [length for _, length, _ in calls] == list(range(tokens - steps - 1, tokens))
        assert torch.cat([ids for ids, _, _ in calls], 1).tolist() == [row[-steps - 1:].tolist()]
        kinds = {type(layer).__name__ for layer in before[2].layers}
        assert kinds == ({"DynamicLayer"} if ratio is None else {cache.layer_class().__name__})
        caches.append(before[2])
        calls.clear()
    assert caches[0] is not caches[1] and opening.get_seq_length() == own


def test_a_prompt_is_read_in_one_pass_with_a_cache_and_the_last_token_s_logits(monkeypatch):
    model, row, calls = tiny_model("llama"), row_of(40), []
    monkeypatch.setattr(model, "forward", lambda **inputs: calls.append(inputs))
    work = Prefill(40)
    assert (work.timed_tokens, work.timed_runs, work.prefix(model, row)) == (40, 1, None)
    work.begin(model, row, None)()
    (call,) = calls
    assert torch.equal(call.pop("input_ids"), row[None])
    assert call == {"use_cache": True, "logits_to_keep": 1}
    assert torch.equal(work.answer(tiny_model("llama"), row, None), token_losses(tiny_model("llama"), row[None])[0])


@pytest.mark.parametrize("family, overrides", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_a_decode_plan_is_judged_on_the_tokens_after_the_prompt(tmp_path, family, overrides):
    model, work = tiny_model(family, **overrides), Decode(400)
    windows = {"choose": torch.stack([row_of(400, 1), row_of(400, 2)])}
    judge = Judge(model, work, windows, Stages(tmp_path), {})
    judge.prepare("choose", lambda: None)
    assert judge.dense["choose"].shape == (2, 199)
    whole = judge.judge(paged(model, 0.0), "choose", lambda: None)
    assert whole.quality.value == pytest.approx(1.0, abs=1e-5)
    assert set(whole.density) == set(prunable_layers(model))
    assert {share for groups in whole.density.values() for share in groups} == {1.0}
    sparse = judge.judge(paged(model, 0.5), "choose", lambda: None)
    assert all(0 < share < 1 for groups in sparse.density.values() for share in groups)
    assert sparse.quality.tokens == 398 and sparse.quality.value != 1
    prefixes = [work.prefix(model, row) for row in windows["choose"]]
    convert(model, paged(model, 0.5))
    losses = torch.stack([work.answer(model, row, prefix)
                          for row, prefix in zip(windows["choose"], prefixes, strict=True)])
    assert sparse.quality == compare(judge.dense["choose"], losses)


def test_the_prompt_of_a_decode_reading_is_the_dense_model_s_whatever_came_before(tmp_path):
    model = tiny_model("llama")
    windows = {use: torch.stack([row_of(200, seed), row_of(200, seed + 1)]) for seed, use in ((1, "a"), (3, "b"))}
    judge = Judge(model, Decode(200), windows, Stages(None), {})
    for use in windows:
        judge.prepare(use, lambda: None)
    first = [judge.judge(paged(model, 0.5), use, lambda: None) for use in ("a", "b", "a")]
    assert first[0] == first[2] != first[1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("room", ["weights", "experts", "depth", "heads"])
def test_a_plan_of_changed_parts_reads_its_own_prompt_where_it_is_judged(family, room):
    """As a user gets it: the losses are those of one pass of the pruned model over the whole row."""
    model, row = tiny_model(family), row_of(200)
    entry = {"weights": Weights(rule=TopK(32), saliency="magnitude"), "experts": Experts(rule=TopK(24), unit=1),
             "depth": Depth(rule=Fixed(()), part="attention"), "heads": Heads(num_kv_heads=1, merge="mean")}[room]
    plan = Plan((Entry(layer=1, room=room, config=entry), *paged(model, 0.0).entries[:1]))
    seen = calibrate(model, row[None], wanted(plan))
    judge = Judge(model, Decode(200), {"choose": row[None]}, Stages(None), {}, lambda _: seen)
    judge.prepare("choose", lambda: None)
    found = judge.judge(plan, "choose", lambda: None)
    own = token_losses(convert(model, plan, seen), row[None])[:, 100:]
    assert found.quality.value == pytest.approx(compare(judge.dense["choose"], own).value, rel=1e-5)


def test_what_only_decoding_prunes_reads_no_prompt_of_its_own(monkeypatch):
    read, prefix = [], Decode.prefix
    monkeypatch.setattr(Decode, "prefix", lambda work, model, row: read.append(row) or prefix(work, model, row))
    model = tiny_model("llama")
    judge = Judge(model, Decode(200), {"choose": row_of(200)[None]}, Stages(None), {})
    judge.prepare("choose", lambda: None)
    judge.judge(paged(model, 0.5), "choose", lambda: None)
    assert len(read) == 1


@pytest.mark.parametrize("family, overrides", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_the_slack_of_decoding_is_that_of_pages(family, overrides):
    model, work, steps = tiny_model(family, **overrides), Decode(400), []
    rules = [*slack.options(work), Threshold(0.9)]  # attention of random weights is flat
    layers = prunable_layers(model)
    found = slack.measure(model, work, row_of(400)[None], layers, NEAR, rules=rules, step=lambda: steps.append(1))
    assert [layer.layer for layer in found] == list(layers) and len(steps) == len(layers)
    for layer in found:
        assert [option.rule for option in layer.options] == rules
        assert layer.options[0].density == [1.0] * 4 and max(layer.options[0].error) == 0
        densities = [sum(option.density) for option in layer.options]
        assert densities == sorted(densities, reverse=True) and all(option.seconds > 0 for option in layer.options)
    last = [layer.options[-1] for layer in found]
    assert any(sum(option.density) < 4 and max(option.error) > 0 for option in last)
    assert not hasattr(model, "cache_hook_of_sentei")


@pytest.mark.parametrize("work, first", [(Prefill(64), All()), (Decode(64), Threshold(0.0))], ids=str)
def test_the_first_option_keeps_everything_and_so_does_the_plan_a_forecast_starts_from(work: Workload, first):
    rules = slack.options(work)
    assert rules[0] == first and all(isinstance(rule, Threshold) for rule in rules[1:])
    whole = slack.whole_plan(work, (0, 2), Config())
    assert [(entry.layer, entry.config.rule, entry.config.decode) for entry in whole.entries] == [
        (0, All(), first), (2, All(), first)]


@pytest.mark.parametrize("work, passes, begun", [(Decode(8), [9.0, 2.0, 5.0], 1), (Prefill(8), [9.0], 2)], ids=str)
def test_a_run_is_as_long_as_its_quickest_pass_says(monkeypatch, work, passes, begun):
    """The first pass of a prompt pays for what the second finds ready; what else runs here only ever adds."""
    run = Judge(tiny_model("llama"), work, {"calibrate": row_of(8)[None]}, Stages(None), {}).run("calibrate")
    begins = []

    def begin(plan):
        begins.append(plan)
        run.work = lambda: [seconds / len(begins) for seconds in passes]

    monkeypatch.setattr(run, "begin", begin)
    assert run.least(Plan()) == min(passes) / begun * work.timed_runs and len(begins) == begun


def test_where_nothing_chooses_pages_all_tokens_are_read_in_one_call(monkeypatch):
    monkeypatch.setattr(workload, "losses_after", lambda *inputs, rows: rows)
    model, row, work = tiny_model("llama"), row_of(80), Decode(80)
    prefix = work.prefix(model, row)
    assert work.answer(model, row, prefix) == Decode.READ
    convert(model, Plan.everywhere([1], "connections", Config(rule=Threshold(0.1))))
    assert work.answer(model, row, prefix) == Decode.READ
    convert(model, paged(model, 0.0))
    assert work.answer(model, row, prefix) == Decode.AT_ONCE
