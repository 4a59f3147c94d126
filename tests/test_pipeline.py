"""The main job end to end, on a tiny random model: what it writes, how it goes on, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import sentei
from sentei import pipeline
from sentei.axes.connections import Config
from sentei.budget.judge import short_key
from sentei.budget.slack import options
from sentei.budget.solver import Candidate, Solution
from sentei.budget.workload import workload_of
from sentei.conversion import wrapper
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Entry, Plan, convert
from sentei.core.errors import FileError, ResourceError, SenteiError
from sentei.core.rules import All, Threshold
from sentei.measurement.quality import Quality

DENSE = Candidate(name="dense", plan=Plan(), seconds=1.0, density=1.0)
KEYS = {"schema", "model", "workload", "dtype", "threads", "dense", "pruned", "speedup", "quality", "density", "plan",
        "does", "rooms", "frontier", "out"}


@pytest.fixture(scope="module")
def done(subject, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "out"
    return pipeline.run(pipeline.Request(**subject, quality=0.5, out=out), pipeline.Silent())


def test_the_public_object_has_the_keys_of_its_schema(done):
    assert set(done.result) == KEYS
    assert done.result["schema"] == "sentei.prune/1"
    assert set(done.result["dense"]) == set(done.result["pruned"]) == {"perplexity", "seconds", "tokens_per_second"}
    assert all(set(entry) == {"layer", "room", "option", "rule", "density"} for entry in done.result["plan"])
    json.dumps(done.result, allow_nan=False)


def test_the_frontier_says_of_every_point_what_was_measured(done):
    points = done.result["frontier"]
    proved = [point for point in points if point["speed"] == "measured"]
    judged = [point for point in points if point["speed"] == "foreseen"]
    assert {point["text"] for point in proved} == {"verify"} and {point["text"] for point in judged} == {"choose"}
    chosen, = [point for point in proved if point["chosen"]]
    assert (chosen["speedup"], chosen["quality"]) == (done.result["speedup"], done.result["quality"])
    assert len(judged) >= 2 and len(points) == len(proved) + len(judged)


def test_the_folder_loads_and_generates(done):
    model = sentei.load(done.result["out"])
    prompt = torch.arange(2, 12)[None]
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert 10 < tokens.shape[1] <= 14
    assert len(wrapper.rooms(model)) == len(done.plan.standing("under").entries)


def test_the_folder_proves_itself_in_a_fresh_process(done):
    receipt = pipeline.verify(Path(done.result["out"]))
    assert receipt["met"] and 0 <= receipt["difference"] <= receipt["tolerance"]


def test_a_changed_weight_is_seen_by_the_receipt(done, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(done.result["out"], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "o_proj" in name)
    weights[name] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not pipeline.verify(folder)["met"]


def test_the_same_request_does_nothing_twice(subject, done, monkeypatch):
    def never(*arguments):
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr("sentei.budget.workload.token_losses", never)
    monkeypatch.setattr("sentei.budget.slack.measure", never)
    monkeypatch.setattr("sentei.budget.judge.interleave", never)
    again = pipeline.run(pipeline.Request(**subject, quality=0.5, out=Path(done.result["out"])), pipeline.Silent())
    assert again.result == done.result


def test_a_model_in_memory_is_converted_and_nothing_is_written(subject, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = locate(subject["model"])
    model = load_model(checkpoint)
    outcome = sentei.prune(model, load_tokenizer(checkpoint), text=subject["text"], workload="prefill:512", quality=0.5)
    assert outcome.model is model and outcome.report is None and outcome.result["out"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_speed_out_of_reach_is_not_met_and_says_how_far_it_came(subject, tmp_path):
    outcome = pipeline.run(pipeline.Request(**subject, speed=1000.0, out=tmp_path / "out"), pipeline.Silent())
    assert not outcome.met and "times as fast" in outcome.reason


@pytest.mark.parametrize("settings, message", [
    ({"quality": 1.5}, "--quality: expected a number above 0 and at most 1, got 1.5"),
    ({"quality": 0.9, "speed": 2.0}, "goal: expected either a quality or a speed"),
    ({"speed": 0.5}, "--speed: expected a number from 1, got 0.5"),
    ({"quality": 0.9, "workload": "prefill:1"}, "--workload: expected prefill:TOKENS"),
    ({"quality": 0.9, "workload": "decode:7"}, "or decode:TOKENS with at least 8 tokens, got 'decode:7'"),
    ({"quality": 0.9, "workload": "decode:64", "lookahead": False}, "--no-lookahead: expected a prefill workload"),
], ids=lambda value: "")
def test_a_request_made_in_python_is_checked_too(settings, message):
    with pytest.raises(SenteiError, match=message):
        pipeline.Request(**settings)


@pytest.mark.slow
def test_the_shortest_workload_still_has_an_interval(prune, tmp_path):
    """Two windows of one prediction each: the least from which a spread can be told."""
    done = prune("--json", workload="prefill:2")
    assert done.returncode == 0 and json.loads(done.stdout)["workload"] == "prefill:2"
    assert "not measured" not in (tmp_path / "out" / "report.html").read_text()


def test_two_runs_do_not_share_a_folder(subject, tmp_path):
    out = tmp_path / "out"
    with pipeline.claimed(out, pipeline.MARKER, "x"), pytest.raises(ResourceError, match="no other process"):
        pipeline.run(pipeline.Request(**subject, quality=0.5, out=out), pipeline.Silent())


def test_where_no_plan_is_faster_the_bound_is_not_met_and_the_dense_model_is_kept(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("sentei.budget.chooser.solve", lambda *_: Solution(ladder=[DENSE], judged=[]))
    monkeypatch.setattr("sentei.budget.chooser.solve_all", lambda goal, market, alone, *_: alone)
    outcome = pipeline.run(pipeline.Request(**subject, quality=0.5, out=tmp_path / "out"), pipeline.Silent())
    assert not outcome.met and "faster than the dense model" in outcome.reason
    assert outcome.result["speedup"] == 1 and outcome.result["plan"] == []


def test_a_bound_that_no_plan_keeps_is_not_met_and_says_what_was_reached(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("sentei.measurement.quality.compare", lambda *_: Quality(
        value=0.4, low=0.3, high=0.5, dense=1.0, pruned=2.5, tokens=1))
    outcome = pipeline.run(pipeline.Request(**subject, quality=0.5, out=tmp_path / "out"), pipeline.Silent())
    assert not outcome.met and "quality 0.4000 on held-out text, below 0.5" in outcome.reason


@pytest.mark.parametrize("changed", ["sentei.budget.slack.options", "sentei.kernels.native.identity"])
def test_a_stage_is_done_again_when_the_rules_or_the_kernel_have_changed(subject, done, monkeypatch, changed):
    def noticed(*arguments, **settings):
        raise RuntimeError("done again")

    new = [All(), Threshold(0.5)] if changed.endswith("options") else "another library"
    monkeypatch.setattr(changed, lambda *_: new)
    monkeypatch.setattr("sentei.budget.judge.Judge._prefixes", noticed)
    with pytest.raises(RuntimeError, match="done again"):
        pipeline.run(pipeline.Request(**subject, quality=0.5, out=Path(done.result["out"])), pipeline.Silent())


def test_the_report_of_a_model_in_memory_says_how_to_repeat_it_in_python():
    request = pipeline.Request(workload="prefill:512", quality=0.9, out=Path("faster"))
    assert request.call() == "sentei.prune(model, tokenizer, workload='prefill:512', quality=0.9, out='faster')"
    stricter = dataclasses.replace(request, lookahead=False)
    assert stricter.call() == request.call()[:-1] + ", lookahead=False)"
    assert stricter.command() == request.command() + " --no-lookahead"


def test_a_model_in_memory_is_as_it_was_when_the_input_is_refused(subject, tmp_path):
    checkpoint = locate(subject["model"])
    model = load_model(checkpoint).train()
    room = Config(rule=Threshold(0.5))
    convert(model, Plan((Entry(layer=0, room="connections", config=room),)))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(FileError, match="expected at least"):
        sentei.prune(model, load_tokenizer(checkpoint), text=short, workload="prefill:512")
    assert len(wrapper.rooms(model)) == 1 and model.training


@pytest.mark.parametrize("flags", [[], ["--no-lookahead"]], ids=["as it runs", "without lookahead"])
def test_without_lookahead_a_strict_reading_is_held_to_the_bound_too(prune, tmp_path, monkeypatch, flags):
    sparsest = max((rule for rule in options(workload_of("prefill:512")) if rule != All()), key=lambda rule: rule.ratio)
    plan = Plan.everywhere((0, 1), "connections", Config(rule=sparsest, window=0))
    sparse = Candidate(name="sparse", plan=plan, seconds=1.0, density=0.5)
    monkeypatch.setattr("sentei.budget.chooser.solve", lambda goal, work, slack, config, judge, forecast: Solution(
        ladder=[sparse], judged=[(sparse, judge(sparse))]))
    monkeypatch.setattr("sentei.budget.chooser.solve_all", lambda goal, market, alone, *_: alone)
    first = prune(*flags, workload="prefill:512", quality=0.1)
    assert not first.returncode, first.stderr[-1500:]
    summary = first.stdout
    result = json.loads(prune(*flags, "--json", workload="prefill:512", quality=0.1).stdout)
    policy = json.loads((tmp_path / "out" / "sentei.json").read_text())
    report = (tmp_path / "out" / "report.html").read_text()
    stages = {path.stem: json.loads(path.read_text())["result"] for path in (tmp_path / "out" / "stages").iterdir()}
    as_run, strict = (stages.get(f"verify-{short_key(one)}") for one in (plan, plan.without_lookahead()))
    for told in (result, policy["facts"]):
        assert told["quality"] == pytest.approx(as_run["quality"]["value"])
        assert told.get("quality_without_lookahead") == (strict and strict["quality"]["value"])
    assert result["pruned"]["perplexity"] == as_run["quality"]["pruned"]
    assert [entry["density"] for entry in result["plan"]] == pytest.approx(
        [sum(heads) / len(heads) for heads in as_run["density"].values()])
    assert Plan.from_json(policy["plan"]) == plan, "what runs is the plan itself"
    assert bool(strict) == bool(flags)
    assert f"choose-{short_key(plan.without_lookahead() if flags else plan)}" in stages
    for words in ("Read without lookahead", "the bound is also kept", "--no-lookahead"):
        assert (words in report) == bool(flags)
    line = f"without lookahead  quality {strict['quality']['value']:.4f}" if flags else "without lookahead  "
    assert (line in summary) == bool(flags)
