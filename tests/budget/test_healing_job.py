"""A chosen plan, healed, through the whole job: what is trained on, what is proved, what is written, what is kept."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from terminal import watching

from sentei import pipeline
from sentei.axes import connections, depth, heads, weights
from sentei.budget import distilled
from sentei.budget.chooser import Chooser
from sentei.budget.solver import Candidate, Solution
from sentei.commands import prune as main_job
from sentei.conversion.plan import Entry, Plan
from sentei.core.rules import Fixed, Threshold, TopK
from sentei.core.storage import read_json
from sentei.training import healing as training

UNEVEN = Plan((Entry(layer=0, room="weights", config=weights.Config(rule=TopK(64), saliency="obs")),
               Entry(layer=1, room="heads", config=heads.Config(num_kv_heads=1, merge="joint")),
               Entry(layer=2, room="depth", config=depth.Config(rule=Fixed(()), part="network"))))
SPARSE = Plan.everywhere(range(3), "connections", connections.Config(rule=Threshold(0.3)))
PAGES = Plan.everywhere(range(3), "connections", connections.Config(decode=Threshold(0.3)))
EVEN = Plan.everywhere(range(3), "weights", weights.Config(rule=TopK(64), saliency="obs"))
SLOW = pytest.mark.slow
MINUTES = ("--heal", "0.025")
GAIN = 0.05


class Ticks:
    """A clock that goes on a twentieth of a second whenever it is read."""

    seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 0.05
        return self.seconds


@pytest.fixture
def healed(prune, tmp_path, monkeypatch):
    """`sentei prune --heal` of the tiny job with a plan; returns the finished command and the public result.

    The tiny model is random, so that saying what it says makes no text likelier: `better` says whether it is proved,
    and `gain` what it then gains on the held-out text.
    """
    heal, judged = training.heal, distilled.HealedJudge.judge

    def run(plan: Plan, *flags: str, better: bool = True, gain: float = GAIN, **changes):
        def judge(own, asked, use, step):
            found = judged(own, asked, use, step)
            return replace(found, quality=replace(found.quality, value=found.quality.value + gain))

        candidate = Candidate(name="given", plan=plan, seconds=1.0, density=1.0)
        monkeypatch.setattr(Chooser, "solution", lambda *_: Solution(ladder=[candidate], judged=[]))
        monkeypatch.setattr(Chooser, "beside", lambda *_: [candidate])
        monkeypatch.setattr(training.Healing, "kept", better)
        monkeypatch.setattr(distilled.HealedJudge, "judge", judge)
        monkeypatch.setattr(training, "heal", partial(heal, now=Ticks()))
        done = prune(*(flags or MINUTES), "--json", **{"quality": 0.1} | changes)
        assert not done.returncode, done.stderr[-2000:]
        return done, json.loads(done.stdout)

    return run


@pytest.mark.parametrize("plan, rung, changes", [
    (UNEVEN, "B", {"dtype": "bfloat16"}), pytest.param(EVEN, "A", {}, marks=SLOW),
    pytest.param(SPARSE, "C", {}, marks=SLOW), pytest.param(UNEVEN, "B", {"workload": "decode:256"}, marks=SLOW),
], ids=["B in bfloat16", "A", "C", "B for decoding"])
def test_the_healed_model_is_proved_and_written(healed, subject, tmp_path, plan, rung, changes):
    _, result = healed(plan, **changes)
    out, table = tmp_path / "out", result["healed"]["table"]
    stages = {path.stem: read_json(path)["result"] for path in (out / "stages").glob("*.json")}
    unhealed, = (stage for name, stage in stages.items() if name.startswith("verify-"))
    own, = (stage for name, stage in stages.items() if name.startswith("healed-verify-"))
    timed, = (stage for name, stage in stages.items() if name.startswith("healed-time-"))
    assert result["healed"]["kept"] and result["healed"]["minutes"] == 0.025 and table[-1]["minutes"] <= 0.025
    assert result["quality"] == pytest.approx(own["quality"]["value"] + GAIN, rel=1e-9)  # as it was judged
    assert abs(own["quality"]["value"] - unhealed["quality"]["value"]) > 1e-6
    assert result["healed"]["quality_unhealed"] == unhealed["quality"]["value"]
    assert result["pruned"]["seconds"] == sorted(timed["pruned"])[1]
    receipt, policy = read_json(out / "sentei-receipt.json"), read_json(out / "sentei.json")
    assert receipt["met"] and policy["rung"] == rung and policy["facts"]["healed"] == result["healed"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert policy["facts"]["verify_attempts"] == 2, "unhealed and healed"
    own, dense = (load_file(folder / "model.safetensors")[name] for folder in (out, Path(subject["model"])))
    assert own.shape != dense.shape or not torch.equal(own, dense.to(own.dtype))
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for told in (page, card):
        assert f"{table[-1]['tokens']:,}" in told and "ealed" in told
    assert "plain weights" not in card and "changed by healing" in card and "Healed weights, same tokens" in page


@pytest.mark.slow
def test_a_healed_model_that_is_no_better_is_not_kept_and_says_so(healed, tmp_path):
    done, result = healed(EVEN, better=False)
    out, told = tmp_path / "out", result["healed"]
    assert not told["kept"] and "no better than unhealed: quality on the checks" in told["reason"] and told["table"]
    assert result["quality"] == pytest.approx(told["quality_unhealed"], rel=1e-9)
    assert not list(out.glob("stages/healed-*"))
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "Not kept" in page and "Same weights, same tokens" in page
    assert "are **not** these" in card and "smaller model" in card and "changed by" not in card


def test_a_plan_that_keeps_the_bound_does_not_make_way_for_a_healed_one_that_does_not(healed):
    _, result = healed(EVEN, gain=-0.95)
    assert not result["healed"]["kept"] and "on held-out text it has quality 0.0" in result["healed"]["reason"]
    assert result["quality"] == pytest.approx(result["healed"]["quality_unhealed"], rel=1e-9)


@pytest.mark.slow
def test_without_minutes_nothing_changes(healed, tmp_path):
    """Bit for bit: the same weights, and the same object, but for what the clock says."""
    _, result = healed(EVEN, better=False)
    tried = (tmp_path / "out" / "model.safetensors").read_bytes()
    for flags in (("--heal", "0"), ("--no-lookahead",)):
        _, plain = healed(EVEN, *flags, out=tmp_path / flags[0].strip("-"))
        strict = {"quality_without_lookahead"} if len(flags) < 2 else set()
        assert plain.keys() == result.keys() - {"healed"} | strict
        assert plain["quality"] == pytest.approx(result["quality"], rel=1e-6)  # which layers are native is the clock's
        assert (tmp_path / flags[0].strip("-") / "model.safetensors").read_bytes() == tried
        assert not list((tmp_path / flags[0].strip("-")).rglob("heal*"))


@pytest.mark.slow
def test_what_only_decoding_prunes_is_not_healed_and_says_so(healed):
    _, result = healed(PAGES, workload="decode:256")
    told = result["healed"]
    assert not told["kept"] and "nothing that the reading of a text would feel" in told["reason"] and not told["table"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_ctrl_c_while_healing_and_the_same_command_goes_on(healed, prune, tmp_path, monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    healed(EVEN, "--heal", "0")  # sets the plan
    with monkeypatch.context() as patch:
        patch.setattr(main_job, "Progress", watching(lambda *at: at == ("heal", step) and interrupt()))
        assert prune(*MINUTES, quality=0.1).returncode == 130
    done, result = healed(EVEN)
    assert result["healed"]["kept"] and len(list((tmp_path / "out" / "stages").glob("heal-*"))) == 1
    once = healed(EVEN)[1]
    assert once == result


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "ten", ""])
def test_minutes_that_are_none_are_refused(prune, text):
    done = prune("--heal", text)
    assert done.returncode == 2 and "error    --heal" in done.stderr


@pytest.mark.slow
def test_too_little_time_is_an_error_that_says_how_much_it_takes(healed, prune):
    healed(EVEN, "--heal", "0")
    done = prune("--heal", "0.00001", quality=0.1)
    assert done.returncode == 2 and "so that a step and the checks before and after it fit" in done.stderr


def test_the_command_says_what_was_asked():
    request = pipeline.Request(quality=0.9, heal=2.5, out=Path("faster"))
    assert "--heal 2.5 --out faster" in request.command()
    assert "heal" not in pipeline.Request(quality=0.9).command()
