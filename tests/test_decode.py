"""The main job for decoding, end to end on a tiny random model."""

import json
import re

import pytest
import torch
from tiny import save_tiny

import sentei
from sentei import pipeline
from sentei.axes.connections import Config
from sentei.budget.solver import Candidate, Solution
from sentei.commands import prune as main_job
from sentei.commands import verb
from sentei.conversion import cache
from sentei.conversion.plan import Plan
from sentei.core.rules import Threshold
from sentei.core.tracing import trace

SPARSE = Config(decode=Threshold(0.9), window=0)


@pytest.fixture
def sparse(monkeypatch):
    """The solver finds one plan, a sparse one; everything else is done."""
    def solve(goal, work, slack, config, judge, forecast) -> Solution:
        plan = Plan.everywhere([layer.layer for layer in slack], "connections", SPARSE)
        found = Candidate(name="sparse", plan=plan, seconds=1.0, density=0.5)
        return Solution(ladder=[found], judged=[(found, judge(found))])

    monkeypatch.setattr("sentei.budget.chooser.solve", solve)
    monkeypatch.setattr("sentei.budget.chooser.solve_all", lambda goal, market, alone, *_: alone)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_folder_decodes_from_chosen_pages_and_proves_itself(prune, sentei, sparse, tmp_path, family):
    model = save_tiny(tmp_path / "model", family)
    done = prune("--json", model=model, workload="decode:256", quality=0.01)
    assert done.returncode == 0, done.stderr
    result, out = json.loads(done.stdout), tmp_path / "out"
    assert result["workload"] == "decode:256" and 0 < result["density"] < 1
    for entry in result["plan"]:
        assert entry["rule"] == {"name": "threshold", "ratio": 0.9} and 0 < entry["density"] < 1
    for side in ("dense", "pruned"):
        assert result[side]["tokens_per_second"] == pytest.approx(32 / result[side]["seconds"])
    verified = sentei("verify", out, "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["met"]
    assert Plan.from_json(json.loads((out / "sentei.json").read_text())["plan"]).entries[0].config == SPARSE


def test_generate_of_the_loaded_folder_reads_pages(prune, sparse, tmp_path):
    prune(workload="decode:256", quality=0.01)
    model = sentei.load(tmp_path / "out")
    prompt = torch.randint(3, 259, (1, 200))
    with trace(model) as records:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4,
                       do_sample=False)
    rows = [record.selection for record in records if record.selection.ids.shape[2] == 1]
    assert len(rows) == 3 * 3 and {selection.unit for selection in rows} == {cache.PAGE}
    assert any(selection.count().sum() < selection.permitted.sum() for selection in rows)


def test_the_report_speaks_of_decoding(prune, sparse, tmp_path):
    prune(workload="decode:256", quality=0.01)
    page = (tmp_path / "out" / "report.html").read_text()
    words = re.sub("<[^>]*>", "", page)
    assert "tiny writes the last tokens of 256 2.00× faster" in words
    assert "run of 32 tokens, one at a time" in words and "has read itself" in words
    assert "prefill" not in words and "whole block in sight" not in words
    assert "threshold, ratio 0.9" in words and "not measured" not in words


def test_the_whole_job_and_the_same_request_again(prune, tmp_path, monkeypatch):
    """With the real solver: what it finds, and that a second run reads and times nothing."""
    steps = []

    class Counted(verb.Progress):
        def stage(self, name, total):
            steps.append([name, total, 0])
            own = steps[-1]

            class Context:
                def __enter__(self):
                    return lambda note="": own.__setitem__(2, own[2] + 1)

                def __exit__(self, *_):
                    return None

            return Context()

    monkeypatch.setattr(main_job, "Progress", Counted)
    first = prune("--json", workload="decode:256", quality=0.5)
    result = json.loads(first.stdout)
    assert first.returncode == 0 and {entry["layer"] for entry in result["plan"]} == {0, 1, 2}
    for name, total, made in steps:
        assert made == total or name in ("solve", "measure"), (name, total, made)
    steps.clear()

    def never(*_, **__):
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr("sentei.budget.workload.Decode.prefix", never)
    monkeypatch.setattr("sentei.budget.workload.losses_after", never)
    monkeypatch.setattr("sentei.budget.slack.measure", never)
    again = prune("--json", workload="decode:256", quality=0.5)
    assert json.loads(again.stdout) == result


SLOW = pytest.mark.slow


@pytest.mark.parametrize("tokens", [pytest.param(8, marks=SLOW), 9, pytest.param(70, marks=SLOW)])
def test_the_shortest_workloads_are_done_too(prune, tmp_path, tokens):
    done = prune("--json", workload=f"decode:{tokens}")
    assert done.returncode == 0 and {entry["density"] for entry in json.loads(done.stdout)["plan"]
                                     if entry["room"] == "connections"} == {1.0}
    assert "not measured" not in (tmp_path / "out" / "report.html").read_text()


def test_what_is_timed_on_the_dense_side_has_a_plain_cache(prune, sparse, monkeypatch):
    from sentei.budget.workload import Decode

    kinds, step = [], Decode._step

    def noted(model, token, held):
        found = step(model, token, held)
        kinds.append((model.config._attn_implementation, type(held.layers[0]).__name__))
        return found

    monkeypatch.setattr(Decode, "_step", staticmethod(noted))
    prune(workload="decode:64", quality=0.01)
    assert set(kinds) == {("sdpa", "DynamicLayer"), ("sentei", "PagedLayer")}
    assert kinds[-32:] == kinds[-1:] * 32, "a run is 31 steps after one that is not timed"


@pytest.mark.parametrize("flags, changes, message", [
    (["--no-lookahead"], {}, "expected a prefill workload"),
    ([], {"workload": "decode:1025"}, "at most the model's context of 1,024 tokens"),
    ([], {"workload": "decode:7"}, "decode:TOKENS with at least 8 tokens"),
], ids=["lookahead", "context", "short"])
def test_what_decoding_cannot_be_asked(prune, flags, changes, message):
    done = prune(*flags, **{"workload": "decode:64"} | changes)
    assert done.returncode == 2 and message in done.stderr


def test_the_command_of_a_decode_job_asks_the_same():
    request = pipeline.Request(workload="decode:256", quality=0.9)
    assert "--workload decode:256" in request.command() and request.work().tokens == 256
