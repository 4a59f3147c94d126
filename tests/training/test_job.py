"""`sentei train`: the file that is read, the folder that is written, and a real process that is killed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from terminal import four_parts, last_error, unfinished

from sentei import cli
from sentei.axes import depth
from sentei.axes.experts import Config as Room
from sentei.axes.experts import Experts
from sentei.axes.experts.gates import Sigmoid
from sentei.core.errors import FileError, ResourceError, SenteiError, UnsupportedError
from sentei.core.progress import Silent
from sentei.core.rules import Capacity, Mass, TopK
from sentei.core.storage import LOCK, claimed
from sentei.training import job as home
from sentei.training.job import load_model, read_job, read_yaml, run
from sentei.training.losses import Weights

ROOT = Path(cli.__file__).parents[1]
EXPERTS = ("feed_forward: {room: experts, neurons: 40, unit: 8, shared: 1, rule: {name: topk, k: 2}, "
           "gate: {name: sigmoid}}")
FOLDER = {"config.json", "model.safetensors", "loss.svg", "metrics.jsonl", home.MARKER, LOCK}


@pytest.fixture
def mixture(job):
    """The path of the tiny job with experts, which are balanced by a bias and by losses."""
    job.write_text(job.read_text().replace("feed_forward: 24", EXPERTS) + "balance: {switch: 1e-2, sequence: 1e-4}\n")
    return job


def test_the_examples_are_jobs():
    shape, read, config, weights, _ = read_job(ROOT / "examples" / "train.yaml")
    assert (shape(257).heads, read.context, config.optimizer.rate) == ((4, 2), 128, 5e-3) and not weights.used()
    shape, _, _, weights, _ = read_job(ROOT / "examples" / "train_experts.yaml")
    room = shape(257).feed_forward.room
    assert (room.rule, room.gate, room.shared) == (TopK(2), Sigmoid(speed=1e-2), 1)
    assert weights.used() == {"sequence": 1e-4}
    shape, _, _, weights, _ = read_job(ROOT / "examples" / "train_depth.yaml")
    assert shape(257).depth.rule == Capacity(0.5) and not weights.used()


def test_experts_are_trained_balanced_written_and_loaded(mixture, tmp_path):
    result = run(mixture, tmp_path / "out", Silent())
    assert result["density"] < 1 and result["loss_after"] < result["loss_before"] - 0.3
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["added"] > 0.009 and {"violation", "entropy", "unused", "dead"} <= set(row) for row in rows[1:])
    model = load_model(tmp_path / "out")
    (room,) = [module for module in model.modules() if isinstance(module, Experts)]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["blocks.0.block.feed_forward.experts.bias"], room.bias) and room.bias.any()
    model.train()(torch.zeros(2, 5, dtype=torch.int64))  # and it can be trained on
    room.update_bias()
    assert not torch.equal(saved["blocks.0.block.feed_forward.experts.bias"], room.bias)
    mixture.write_text(mixture.read_text().replace("sequence: 1e-4", "sequence: 1e-3"))
    with pytest.raises(FileError, match="another balance"):
        run(mixture, tmp_path / "out", Silent())


def test_what_a_room_leaves_out_has_its_default(job):
    job.write_text("model: {feed_forward: {room: experts, neurons: 128, gate: {name: sigmoid, scale: 2.0}}, "
                   "depth: {room: depth}}")
    shape = read_job(job)[0](9)
    assert shape.feed_forward.room == Room(gate=Sigmoid(scale=2.0)) and shape.depth == depth.Config()


def test_a_folder_is_written_that_can_be_loaded(sentei, job, tmp_path):
    done = sentei("train", job, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "sentei.train/1" and result["loss_after"] < result["loss_before"] - 0.3
    assert set(os.listdir(tmp_path / "out")) >= FOLDER and not unfinished(tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert model.size() == (result["parameters"], result["bytes"]) and not model.training
    assert model.generate(torch.zeros(1, 1, dtype=torch.int64), 5).shape == (1, 6)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(13)) and rows[-1]["held_out"] == result["loss_after"]
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    again = sentei("train", job, "--out", tmp_path / "out")
    lines = dict(re.split("  +", line, maxsplit=1) for line in again.stdout.splitlines())
    assert list(lines) == ["model", "steps", "loss", "perplexity", "work", "use it"]
    assert "12 of them before" in again.stdout
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_pruned_job_says_what_it_saves(job, tmp_path):
    job.write_text(job.read_text().replace("heads: [2, 1]", "heads: [2, 1], connections: "
                   "{rule: {name: topk, k: 1}, tile: [4, 4], window: 0}"))
    result = run(job, tmp_path / "out", Silent())
    assert result["density"] < 1 and result["loss_after"] < result["loss_before"]
    assert load_model(tmp_path / "out").config.connections.tile == (4, 4)


def test_defaults_and_partial_sections(job):
    job.write_text("")
    with pytest.raises(FileError, match="the sections model, data, training"):
        read_job(job)
    job.write_text("model:\ntraining: {optimizer: {rate: 3e-4}}\n")
    shape, read, config, weights, parallel = read_job(job)
    assert weights == Weights() and parallel == home.Parallel()
    assert shape(300).vocabulary == 300 and read == home.data.Config() and config.optimizer.rate == 3e-4
    job.write_text("model: {connections: {rule: {name: mass, mass: 0.9}, window: 4}}")
    connections = read_job(job)[0](9).connections
    assert connections.rule == Mass(0.9) and connections.window == 4 and connections.tile == (64, 64)


@pytest.mark.parametrize(("text", "where", "expected", "got"), [
    ("parallel: {world: 2}", "parallel", "shard, experts", "world"),
    ("parallel: {experts: 0}", "parallel", "experts from 1", "0"),
    ("parallel: {shard: 2}", "parallel", "shard a bool", "2"),
    ("modle: {}", "job.yaml", "some of the keys model, data, training", "modle"),
    ("model: {widht: 4}", "model", "width, layers, heads", "widht"),
    ("model: {vocabulary: 4}", "model", "width, layers, heads", "vocabulary"),
    ("model: {connections: {rul: 4}}", "model.connections", "rule, estimator", "rul"),
    ("model: {connections: {rule: all}}", "rule", "one of all", "'all'"),
    ("data: {texts: []}", "data", "text, tokenizer", "texts"),
    ("training: {optimizer: {lr: 1}}", "training.optimizer", "rate, warmup", "lr"),
    ("training: [1]", "training", "steps, batch", "[1]"),
    ("training: {steps: yes}", "training", "whole numbers", "True"),
    ("training: {optimizer: {rate: fast}}", "optimizer", "rate above 0", "fast"),
    ("model: {width: 30}", "model", "H the width", "30"),
    ("data: {text: []}", "data", "corpora", "()"),
    ("balance: {swich: 1}", "balance", "switch, importance, load, z, sequence", "swich"),
    ("balance: {switch: -1}", "balance", "numbers from 0", "-1"),
    ("balance: {switch: 1}", "balance", "experts in model.feed_forward", "none"),
    (f"model: {{{EXPERTS}}}\nbalance: {{load: 1}}", "balance", "a noisy gate", "Sigmoid"),
    ("model: {feed_forward: {room: experts, neuron: 4}}", "model.feed_forward", "neurons, rule", "neuron"),
    ("model: {feed_forward: {room: experts, gate: {name: soft, slot: 4}}}", "model.feed_forward.gate", "slots", "slot"),
    ("model: {feed_forward: {room: expert}}", "model.Config", "a room of experts", "expert"),
    ("model: {feed_forward: {room: dense}}", "model.Config", "a room of experts", "dense"),
], ids=lambda value: value if ":" in value else "")
def test_a_wrong_key_or_value_is_refused_with_those_there_are(job, text, where, expected, got):
    job.write_text(text)
    with pytest.raises(FileError) as raised:
        read_job(job)
    assert where in raised.value.where and expected in raised.value.expected and got in raised.value.got


@pytest.mark.parametrize("text", [
    "a: 1\na: 2", "a: {b: 1, b: 2}", "a: &x 1\nb: *x", "a: &x 1", "a: !!python/object/apply:os.system [true]",
    "a: !!str 1", "{1: 2}", "a: {1: 2}", "? [a]\n: b", "a: [", "\x00", "- a", "a", "a: <<\n<<: {b: 1}", "[" * 5000,
    "a: " + "9" * 5000, "a: " + " " * (1 << 18)], ids=lambda text: text[:24])
def test_yaml_that_is_no_plain_mapping_is_refused(job, text):
    job.write_text(text)
    with pytest.raises(FileError):
        read_yaml(job)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(FileError):
            read_yaml(path)


def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(sentei, job, tmp_path):
    tiny, out = job.read_text(), tmp_path / "out"
    huge = "feed_forward: {room: experts, neurons: 16777216, unit: 16777216}"
    by_task = ("feed_forward: {room: experts, neurons: 32, unit: 8, rule: {name: topk, k: 2}, "
               "gate: {name: task, tasks: 2}}")
    for old, new, kind, code in (("width: 16", "width: 16, causal: false", UnsupportedError, 5),
                                 ("feed_forward: 24", by_task, UnsupportedError, 5),
                                 ("width: 16", "width: 8388608", ResourceError, 4),
                                 ("width: 16, layers: 1, heads: [2, 1], feed_forward: 24",
                                  f"width: 16384, layers: 1, heads: [2, 1], {huge}", ResourceError, 4),
                                 ("text.txt", "none.txt", FileError, 3)):
        job.write_text(tiny.replace(old, new))
        with pytest.raises(kind):
            run(job, out, Silent())
        done = sentei("train", job, "--out", out)
        assert (done.returncode, done.stdout) == (code, "") and last_error(done.stderr)["error"]
        assert not out.exists()


def test_a_folder_of_something_else_another_job_or_another_process_is_refused(job, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(SenteiError, match="one that sentei train made"):
        run(job, tmp_path / "full", Silent())
    run(job, tmp_path / "out", Silent())
    with claimed(tmp_path / "out", home.MARKER, "x"), pytest.raises(ResourceError, match="no other process"):
        run(job, tmp_path / "out", Silent())
    job.write_text(job.read_text().replace("steps: 12", "steps: 15"))
    with pytest.raises(FileError, match="another training"):
        run(job, tmp_path / "out", Silent())


def test_with_no_out_a_folder_is_chosen_by_the_job(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(job, None, Silent())["out"]
    assert re.fullmatch(r"sentei-out/job-[0-9a-f]{6}", first) and run(job, None, Silent())["resumed_from"] == 12
    job.write_text(job.read_text().replace("rate: 1e-2", "rate: 2e-2"))
    assert run(job, None, Silent())["out"] != first


def test_a_model_that_was_changed_is_refused(job, tmp_path):
    out = tmp_path / "out"
    run(job, out, Silent())
    weights = load_file(out / "model.safetensors")
    for wrong in ({**weights, "more": torch.zeros(1)}, {"norm.weight": weights["norm.weight"]},
                  {**weights, "norm.weight": weights["norm.weight"].half()}):
        save_file(wrong, out / "model.safetensors")
        with pytest.raises(FileError, match="the tensors that config.json describes"):
            load_model(out)
    (out / "config.json").write_text('{"schema": "sentei.prune/1"}')
    with pytest.raises(FileError, match="a model of sentei.train/1"):
        load_model(out)


def process(job, out) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "sentei", "train", str(job), "--out", str(out), "--json"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})


def killed(job, out, when) -> None:
    """A process that gets SIGKILL once `when()`, unless it ends before."""
    running = process(job, out)
    while running.poll() is None and not when():
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["job", "mixture"])
def test_killed_by_the_system_at_many_moments_a_process_ends_with_the_same_bytes(kind, request, tmp_path):
    """The same weights, balancing biases, metrics and checkpoints, whichever moments SIGKILL came at."""
    job = request.getfixturevalue(kind)
    job.write_text(job.read_text().replace("steps: 12", "steps: 120"))
    undisturbed = process(job, tmp_path / "whole").communicate(timeout=120)[0]
    chosen = random.Random(0)
    for round_ in range(4):
        out = tmp_path / f"out{round_}"
        for stop in sorted(chosen.sample(range(1, 121), 3)):
            killed(job, out, lambda out=out, stop=stop: lines(out) >= stop)
        finished = process(job, out)
        stdout, stderr = finished.communicate(timeout=120)
        assert finished.returncode == 0, stderr
        for name in ("metrics.jsonl", "model.safetensors", "checkpoint-00000120.safetensors", "loss.svg"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert json.loads(stdout)["loss_after"] == json.loads(undisturbed)["loss_after"] and not unfinished(out)
        shutil.rmtree(out)


def test_a_usage_error_has_four_parts(sentei):
    done = sentei("train")
    assert done.returncode == 2 and "CONFIG" in four_parts(done.stderr)["got"] + four_parts(done.stderr)["expected"]
