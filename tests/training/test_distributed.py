"""Several processes against one: the same losses, gradients, weights and balance; and checkpoints that fit any number.

In float64, where all that is left between them is the order of sums. A checkpoint holds everything a step depends on;
the gradients are compared through the moments of AdamW.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run

from sentei.axes import depth, experts
from sentei.axes.experts.gates import Renormalised, Sigmoid
from sentei.core.errors import FileError, SenteiError
from sentei.core.progress import Silent
from sentei.core.rules import Capacity, TopK
from sentei.core.storage import read_json, write_json
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.training import checkpoints
from sentei.training import job as home
from sentei.training.data import Bytes, Windows, prepare
from sentei.training.job import load_model
from sentei.training.loop import METRICS, Config, Optimizer, read_metrics, train
from sentei.training.losses import Balanced, Weights, of_predictors, of_rooms
from sentei.training.parallel import Config as Parallel
from sentei.training.parallel import world

ROOT = Path(home.__file__).parents[2]
TEXT = " ".join(f"{number} squared is {number * number}." for number in range(400))
SETTINGS = Config(steps=2, batch=4, accumulate=2, evaluate=2, save=1, optimizer=Optimizer(rate=1e-2, warmup=2))
PLAIN = {"width": 16, "layers": 2, "heads": (2, 1)}
SHAPES = {
    "dense": Shape(**PLAIN, feed_forward=24),
    "softmax": Shape(**PLAIN, feed_forward=Routed(neurons=48, room=experts.Config(
        rule=TopK(2), gate=Renormalised(), unit=8, shared=2, metric="cosine"))),
    "sigmoid": Shape(**PLAIN, feed_forward=Routed(neurons=32, room=experts.Config(
        rule=TopK(2), gate=Sigmoid(speed=0.05), unit=8))),
    "depth": Shape(**PLAIN, feed_forward=24, depth=depth.Config(rule=Capacity(0.5))),
}
SHAPES["one pass"] = SHAPES["softmax"]  # a step: then a process has to hear of the others' loads alone
WEIGHTS = {"softmax": Weights(switch=0.1, importance=0.1, z=0.01), "sigmoid": Weights(sequence=0.1)}
WEIGHTS["one pass"] = WEIGHTS["softmax"]
LAYOUTS = {"copies": Parallel(), "shard": Parallel(shard=True), "experts": Parallel(experts=2),
           "both": Parallel(shard=True, experts=2), "all experts": Parallel(experts=4)}
CASES = {1: [("softmax", "shard")],
         2: [("dense", "copies"), ("dense", "shard"), ("softmax", "copies"), ("one pass", "experts"),
             ("sigmoid", "both"), ("depth", "copies")],
         4: [("softmax", "both"), ("softmax", "all experts"), ("sigmoid", "experts"), ("depth", "shard")]}
NAMES = [pytest.param(size, *case, id=f"{size} {' '.join(case)}") for size, cases in CASES.items() for case in cases]
SPREAD = 1e-10  # between sums in another order in float64, as AdamW divides them by 1e-8 at the least


class Stopped(BaseException):
    """Stands for a kill that comes to all processes."""


def trained(kind: str, layout: str, out: Path, last: int = 2) -> dict:
    """A run in the processes there are, from the newest checkpoint on; stopped after step `last`."""
    done = []

    def step(note):
        done.append(note)
        if len(done) == last < 2:
            raise Stopped

    with world() as processes:
        out.mkdir(exist_ok=True)
        windows = Windows(processes.in_turn(lambda: prepare([TEXT], Bytes(), out)), context=16, held_out=3, seed=0)
        torch.manual_seed(0)
        model = Transformer(SHAPES[kind]).double()
        processes.place(model, LAYOUTS[layout])
        terms = (of_rooms, of_predictors, Balanced(WEIGHTS.get(kind, Weights()), processes))
        try:
            config = replace(SETTINGS, accumulate=1) if kind == "one pass" else SETTINGS
            return train(model, windows, config, out, job={"kind": kind}, terms=terms, world=processes, step=step)
        except Stopped:
            return {}


def several(folder: Path, cases: list, last: int = 2) -> list[dict]:
    """All the cases, one after the other in the same processes."""
    return [trained(kind, layout, folder / f"{kind} {layout}", last) for kind, layout in cases]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folders of runs in one process, by kind."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in SHAPES:
        trained(kind, "copies", folder / kind)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folders of runs in several, by their number."""
    folders = {size: tmp_path_factory.mktemp(f"world{size}") for size in CASES}
    for size, cases in CASES.items():
        for result in run(several, size, folders[size], cases):
            assert len(result) == len(cases) and isinstance(result[0], dict), result
    return folders


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Runs that all their processes left after the first of two steps: of one process, and of two."""
    folder = tmp_path_factory.mktemp("stopped")
    trained("softmax", "copies", folder / "one", last=1)
    assert run(several, 2, folder, [("softmax", "both")], 1) == [[{}], [{}]]
    (folder / "softmax both").rename(folder / "two")
    return folder


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds, read in one process."""
    found = checkpoints.newest(out)
    filled = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in found.shapes().items()}
    found.fill(filled)
    return filled


def compare(out: Path, reference: Path, step: int = 2) -> None:
    """The metrics and the newest checkpoint of two runs."""
    rows, expected = (read_metrics(folder / METRICS, step) for folder in (out, reference))
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=SPREAD, abs=SPREAD), row["step"]
    torch.testing.assert_close(tensors(out), tensors(reference), rtol=SPREAD, atol=SPREAD)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind", "layout"), NAMES)
def test_several_processes_do_what_one_does(alone, together, size, kind, layout):
    compare(together[size] / f"{kind} {layout}", alone / kind)


@pytest.mark.slow
def test_what_one_or_two_saved_goes_on_in_four_and_in_one(alone, stopped, tmp_path):
    assert checkpoints.steps(stopped / "one") == checkpoints.steps(stopped / "two") == [1]
    cases = {"one": ("softmax", "both"), "two": ("softmax", "shard")}
    for name, case in cases.items():
        shutil.copytree(stopped / name, tmp_path / " ".join(case))
    for results in run(several, 4, tmp_path, list(cases.values())):
        assert [result["resumed_from"] for result in results] == [1, 1], results
    shutil.copytree(stopped / "two", tmp_path / "back")
    assert trained("softmax", "copies", tmp_path / "back")["resumed_from"] == 1
    for name in (*map(" ".join, cases.values()), "back"):
        compare(tmp_path / name, alone / "softmax")


@pytest.mark.slow
def test_a_checkpoint_of_several_is_safetensors_and_json_alone(stopped):
    names = sorted(path.name for path in (stopped / "two").rglob("*") if not path.name.startswith("tokens-"))
    assert names == ["checkpoint-00000001-1-of-2.safetensors", "checkpoint-00000001-2-of-2.safetensors",
                     "checkpoint-00000001.json", METRICS]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_damaged_part_is_refused_and_the_checkpoint_before_named(together, tmp_path, how):
    out = shutil.copytree(together[2] / "dense shard", tmp_path / "out")
    part = out / "checkpoint-00000002-2-of-2.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?") if how == "flipped" else part.unlink()
    with pytest.raises(FileError, match=r"remove .*checkpoint-00000002.json to go on from checkpoint-00000001, which"):
        checkpoints.newest(out)


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "match"), [(slice(0, 1), "tensors"), (slice(0, 0), "something else")])
def test_a_manifest_that_leaves_out_a_part_is_refused(together, tmp_path, keep, match):
    out = shutil.copytree(together[4] / "softmax both", tmp_path / "softmax both")
    manifest = read_json(out / "checkpoint-00000002.json")
    manifest["files"] = dict(list(manifest["files"].items())[keep])
    write_json(out / "checkpoint-00000002.json", manifest)
    with pytest.raises(FileError, match=match):
        trained("softmax", "copies", out)
    assert len(manifest["files"]) == 0 or len(checkpoints.newest(out).files) == 1


@pytest.mark.slow
def test_parts_with_gaps_are_refused(together, tmp_path):
    out = shutil.copytree(together[4] / "softmax both", tmp_path / "out")
    manifest = read_json(out / "checkpoint-00000002.json")
    del manifest["files"]["checkpoint-00000002-1-of-4.safetensors"]
    write_json(out / "checkpoint-00000002.json", manifest)
    with pytest.raises(FileError, match="gaps"):
        checkpoints.newest(out).shapes()


def leaves(out: Path) -> list:
    """The second process ends in the middle, without a word; what the first says, and after how many seconds."""
    def end(note):
        os._exit(9)

    second = torch.distributed.get_rank() == 1
    with world() as processes:
        windows = Windows(processes.in_turn(lambda: prepare([TEXT], Bytes(), out)), context=16, held_out=3, seed=0)
        model = Transformer(SHAPES["dense"])
        processes.place(model, Parallel(shard=True))
        train(model, windows, SETTINGS, out, job={}, world=processes, step=end if second else str)


def test_a_process_that_ends_ends_the_run(tmp_path):
    start = time.monotonic()
    (kind, text), code = run(leaves, 2, tmp_path)
    assert code == 9 and kind == "ResourceError" and "expected an answer of every process" in text
    assert "the process that ended first" in text and time.monotonic() - start < 30


def small() -> dict:
    """What is said of models and numbers that do not fit two processes, and what each of two holds."""
    unit = experts.Config(rule=TopK(2), gate=Renormalised(), unit=8)
    wrong = [(SHAPES["dense"], 2), (SHAPES["softmax"], 4),
             (Shape(**PLAIN, feed_forward=Routed(neurons=24, room=unit)), 2),
             (Shape(**PLAIN, feed_forward=Routed(neurons=32, room=unit), depth=depth.Config(rule=Capacity(0.5))), 2)]
    said = []
    with world() as processes:
        for shape, number in wrong:
            with pytest.raises(SenteiError) as error:
                processes.place(Transformer(shape), Parallel(experts=number))
            said.append(str(error.value))
        with pytest.raises(SenteiError) as error:
            train(Transformer(SHAPES["dense"]), None, Config(batch=3), Path(), job={}, world=processes)
        model = Transformer(SHAPES["softmax"])
        whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
        processes.place(model, LAYOUTS["both"])
        held = {name: parameter.to_local().untyped_storage().nbytes() / 4 / whole[name]
                for name, parameter in model.named_parameters() if whole[name] % 2 == 0}
    return {"said": [*said, str(error.value)], "held": held}


def test_what_cannot_be_shared_is_refused_and_what_is_shared_is_held_in_part():
    for result in run(small, 2):
        patterns = ["a model with experts.*no experts", "divides that of the processes, 2.*got 4",
                    "2 equal parts.*3 experts", "passes.*mixture of depths",
                    "training.batch.*multiple of the processes, 2"]
        for pattern, text in zip(patterns, result["said"], strict=True):
            assert re.search(pattern, text), text
        assert len(result["held"]) > 10 and all(0.5 <= part < 0.51 for part in result["held"].values())
    with pytest.raises(SenteiError, match="more processes, by torchrun"), world() as processes:
        processes.place(Transformer(SHAPES["softmax"]), Parallel(experts=2))


def whole(path: Path, out: Path) -> dict | None:
    """The whole job."""
    return home.run(path, out, Silent())


def test_the_whole_job_in_two_processes_writes_what_one_writes(job, tmp_path):
    mixture = "{room: experts, neurons: 32, unit: 8, rule: {name: topk, k: 2}, gate: {name: renormalised}}"
    job.write_text(job.read_text().replace("steps: 12", "steps: 4").replace("feed_forward: 24",
                   f"feed_forward: {mixture}") + "balance: {switch: 0.1}\n")
    alone = job.read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = home.run(job, tmp_path / "one", Silent())
    job.write_text(alone + "parallel: {shard: true, experts: 2}\n")
    two, nothing = run(whole, 2, job, tmp_path / "two")
    job.write_text(alone)
    again = home.run(job, tmp_path / "two", Silent())
    torch.set_num_threads(threads)
    assert nothing is None and {*one} == {*two}, two
    assert two["loss_after"] == pytest.approx(one["loss_after"], rel=1e-4)
    assert again["resumed_from"] == 4 and again["loss_after"] == two["loss_after"]
    for key in ("parameters", "bytes", "density", "multiply_adds_per_token"):
        assert one[key] == two[key], key
    first, second = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


def test_one_process_needs_nothing_of_it(job, tmp_path):
    job.write_text(job.read_text().replace("steps: 12", "steps: 1"))
    code = ("import sys, torch; from pathlib import Path; from sentei.training import job; "
            "from sentei.core.progress import Silent; "
            f"job.run(Path({str(job)!r}), Path({str(tmp_path / 'out')!r}), Silent()); "
            "assert not torch.distributed.is_initialized(); print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    several = {"sentei.training.distributed", "sentei.training.shards", "torch.distributed.checkpoint"}
    assert not several & set(done.stdout.split()) and "sentei.training.parallel" in done.stdout.split()


@pytest.mark.slow
def test_torchrun_starts_it(job, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "sentei", "train", str(job), "--out", str(tmp_path / "out"), "--json"], capture_output=True,
                          text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object, of one process
    assert result["steps"] == 12 and load_model(tmp_path / "out").size()[0] == result["parameters"]
    job.write_text(job.read_text() + "parallel: {experts: 2}\n")
    done = subprocess.run([*done.args], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 1 and "expected a model with experts" in done.stderr
