"""The loop against the formulas; a run that is cut off anywhere goes on bit for bit; what was changed is refused."""

import math
import os
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from terminal import unfinished

from sentei.axes.experts import Config as Room
from sentei.axes.experts.gates import Sigmoid
from sentei.core import storage
from sentei.core.errors import FileError, SenteiError
from sentei.core.rules import TopK
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.training import checkpoints, loop
from sentei.training.data import Bytes, Windows, prepare
from sentei.training.loop import METRICS, Config, Optimizer, read_metrics, train
from sentei.training.losses import Balanced, Weights, next_token, of_rooms

SHAPE = Shape(width=16, layers=1, heads=(2, 1), feed_forward=24)
ROUTED = Shape(width=16, layers=2, heads=(2, 1), feed_forward=Routed(
    neurons=40, room=Room(rule=TopK(2), gate=Sigmoid(speed=0.003), unit=8, shared=1)))
SETTINGS = Config(steps=12, batch=4, accumulate=2, evaluate=4, save=3, optimizer=Optimizer(rate=1e-2, warmup=3))
TEXT = " ".join(f"{number} squared is {number * number}." for number in range(400))


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


def started(out, config: Config = SETTINGS, shape: Shape = SHAPE, **more) -> tuple[Transformer, dict]:
    """A run in `out`, from its newest checkpoint on."""
    out.mkdir(exist_ok=True)
    windows = Windows(prepare([TEXT], Bytes(), out), context=16, held_out=3, seed=config.seed)
    torch.manual_seed(0)
    model = Transformer(shape)
    return model, train(model, windows, config, out, job={"name": "this"}, **more)


def routed(out, **more) -> tuple[Transformer, dict]:
    """The same of experts with a balancing bias, and a loss of balance that takes two passes."""
    return started(out, shape=ROUTED, terms=(Balanced(Weights(switch=0.1, z=1e-3, sequence=0.01)),), **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its folder, model and result."""
    out = tmp_path_factory.mktemp("training") / "whole"
    return out, *started(out)


@pytest.fixture(scope="module")
def whole_routed(tmp_path_factory):
    """An undisturbed run of `routed`."""
    out = tmp_path_factory.mktemp("training") / "routed"
    return out, *routed(out)


def same(out, model, whole) -> bool:
    """Whether a run ended with the metrics and the weights of the undisturbed one, bit for bit."""
    weights = zip(model.state_dict().values(), whole[1].state_dict().values(), strict=True)
    return (out / METRICS).read_bytes() == (whole[0] / METRICS).read_bytes() and all(torch.equal(*w) for w in weights)


def test_it_learns_and_says_so(whole):
    out, _, result = whole
    rows = read_metrics(out / METRICS, 12)
    assert [row["step"] for row in rows if "held_out" in row] == [0, 4, 8, 12]
    assert result["loss_before"] == rows[0]["held_out"] == pytest.approx(math.log(257), abs=0.1)
    assert result["loss_after"] == rows[12]["held_out"] < result["loss_before"] - 0.5
    assert checkpoints.steps(out) == [9, 12] and len(list(out.glob("checkpoint-*"))) == 4 and not unfinished(out)


def test_steps_are_adamw_s_as_written_in_the_paper(whole):
    """In plain tensors, on whole batches: accumulation changes no gradient, and no decay touches a vector."""
    model, given = started_model(), SETTINGS.optimizer
    windows = Windows(next(whole[0].glob("tokens-*")), context=16, held_out=3, seed=0)
    first = [torch.zeros_like(p) for p in model.parameters()]
    second, losses = [torch.zeros_like(p) for p in model.parameters()], []
    for step in range(1, 5):
        loss = next_token(model, windows.batch(step - 1, 8))
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        done = (step - 1 - 3) / 9
        rate = 1e-2 * (step / 3 if step <= 3 else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        with torch.no_grad():
            for p, g, m, v in zip(model.parameters(), gradients, first, second, strict=True):
                g = g * min(1.0, given.clip / (norm + 1e-6))
                m.mul_(given.beta1).add_(g, alpha=1 - given.beta1)
                v.mul_(given.beta2).add_(g.square(), alpha=1 - given.beta2)
                p.mul_(1 - rate * (given.decay if p.dim() > 1 else 0))
                p.sub_(rate * (m / (1 - given.beta1 ** step))
                       / ((v / (1 - given.beta2 ** step)).sqrt() + given.epsilon))
    rows = read_metrics(whole[0] / METRICS, 12)
    assert [row["loss"] for row in rows[1:5]] == pytest.approx(losses, rel=1e-5)
    assert rows[4]["rate"] == pytest.approx(rate, rel=1e-12) and rows[4]["norm"] == pytest.approx(norm.item(), rel=1e-3)


def started_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE)


@pytest.mark.parametrize("last", range(13))
def test_killed_after_any_step_it_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, last):
    out, done = tmp_path / "out", []

    def kill(note):
        done.append(note)
        if len(done) == last:
            raise Killed

    if last == 0:
        monkeypatch.setattr(loop.Run, "advance", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        started(out, step=kill)
    monkeypatch.undo()
    with open(out / METRICS, "a") as file:
        file.write('{"step": 5, "lo')  # what a kill in the middle of a write leaves
    model, result = started(out)
    assert result["resumed_from"] == last // 3 * 3 and same(out, model, whole)


@pytest.mark.parametrize("last", [2, 3, 7, 11])
def test_experts_with_a_balancing_bias_go_on_bit_for_bit(whole_routed, tmp_path, last):
    """The biases are in the checkpoints, moved by each step's loads; what is counted of a step that was cut is not."""
    out, done = tmp_path / "out", []

    def kill(note):
        done.append(note)
        if len(done) == last:
            raise Killed

    with pytest.raises(Killed):
        routed(out, step=kill)
    model, result = routed(out)
    assert result["resumed_from"] == last // 3 * 3 and same(out, model, whole_routed)
    biases = [tensor for name, tensor in model.state_dict().items() if name.endswith("experts.bias")]
    assert len(biases) == 2 and all(bias.any() for bias in biases)
    saved = load_file(*checkpoints.newest(out).files)
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("which", range(1, 9))
def test_killed_while_a_file_is_put_in_its_place(whole, tmp_path, monkeypatch, which):
    """Also between a checkpoint's tensors and the file that makes them count, and while old ones are removed."""
    out, calls, replace, unlink = tmp_path / "out", [], os.replace, type(tmp_path).unlink

    def counted(then):
        def call(*arguments, **options):
            if not str(arguments[0]).endswith(storage.UNFINISHED) or then is replace:
                calls.append(arguments)
                if len(calls) == which:
                    raise Killed
            return then(*arguments, **options)
        return call

    windows = prepare([TEXT], Bytes(), out)
    assert windows.exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(replace))
        patch.setattr(type(tmp_path), "unlink", counted(unlink))
        with pytest.raises(Killed):
            started(out)
    model, _ = started(out)
    assert same(out, model, whole) and checkpoints.steps(out) == [9, 12] and len(list(out.glob("checkpoint-*"))) == 4


def test_random_numbers_go_on_where_they_were(tmp_path):
    @contextmanager
    def noise(model):
        yield lambda: 0.1 * torch.rand(()) * next(model.parameters()).square().mean()

    model, _ = started(tmp_path / "whole", terms=[noise])
    before = torch.get_rng_state()

    def kill(note, count=[]):  # noqa: B006
        count.append(note)
        if len(count) == 7:
            raise Killed

    with pytest.raises(Killed):
        started(tmp_path / "out", terms=[noise], step=kill)
    again, _ = started(tmp_path / "out", terms=[noise])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert (tmp_path / "out" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    torch.manual_seed(0)
    Transformer(SHAPE)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers were used"


def damage(path, how):
    raw = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": raw[:-7], "empty": b"", "flipped": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
                          "not JSON": raw[:-3], "another step": raw.replace(b'"step": 12', b'"step": 11')}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_good_one_before_it_named(whole, tmp_path, how):
    out = copied(whole[0], tmp_path)
    damage(out / "checkpoint-00000012.safetensors", how)
    with pytest.raises(FileError, match=r"remove .*checkpoint-00000012.json to go on from checkpoint-00000009, which"):
        started(out)
    (out / "checkpoint-00000012.json").unlink()
    model, result = started(out)
    assert result["resumed_from"] == 9 and same(out, model, whole)


@pytest.mark.parametrize("how", ["not JSON", "empty", "another step"])
def test_a_damaged_manifest_is_refused(whole, tmp_path, how):
    out = copied(whole[0], tmp_path)
    damage(out / "checkpoint-00000012.json", how)
    with pytest.raises(FileError, match="to go on from checkpoint-00000009"):
        started(out)
    damage(out / "checkpoint-00000009.safetensors", "flipped")
    with pytest.raises(FileError, match="remove .*12.json to begin again"):
        started(out)


def copied(out, tmp_path):
    import shutil

    return shutil.copytree(out, tmp_path / "out")


def test_a_checkpoint_of_another_job_or_shape_is_refused(whole, tmp_path):
    out = copied(whole[0], tmp_path)
    windows = Windows(next(out.glob("tokens-*")), context=16, held_out=3, seed=0)
    with pytest.raises(FileError, match="another more and name"):
        train(Transformer(SHAPE), windows, SETTINGS, out, job={"name": "that", "more": 1})
    other = Transformer(Shape(width=32, layers=1, heads=(2, 1), feed_forward=24))
    with pytest.raises(FileError, match="exactly the tensors of this job"):
        train(other, windows, SETTINGS, out, job={"name": "this"})


def test_metrics_that_were_cut_are_refused(whole, tmp_path):
    out = copied(whole[0], tmp_path)
    lines = (out / METRICS).read_text().splitlines(keepends=True)
    (out / METRICS).write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(FileError, match="a line for each of the steps 0 to 12"):
        started(out)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(tmp_path):
    @contextmanager
    def bad(model, calls=[]):  # noqa: B006
        calls.append(1)
        yield lambda: torch.tensor(math.nan) if len(calls) > 15 else None

    with pytest.raises(SenteiError, match="step 8: expected a finite loss"):
        started(tmp_path / "out", terms=[bad])
    assert checkpoints.steps(tmp_path / "out") == [3, 6]


def test_bfloat16_keeps_weights_and_checkpoints_in_float32(tmp_path):
    from dataclasses import replace

    model, result = started(tmp_path / "out", replace(SETTINGS, precision="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result["loss_after"] < result["loss_before"] - 0.5
    found = checkpoints.newest(tmp_path / "out")
    assert {tensor.dtype for file in found.files for tensor in load_file(file).values()} == {torch.float32}
    float32 = [row["loss"] for row in read_metrics(tmp_path / "out" / METRICS, 12)[1:]]
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss in float32[:3]), "the loss itself is rounded"


def test_rooms_add_their_loss_from_their_records(tmp_path):
    """A room with `auxiliary(records)` is heard, its loss is in the gradient and in the metrics."""
    model, x = started_model(), torch.arange(17)[None]
    room = model.blocks[0].block.attention.connections
    weight = model.blocks[0].block.attention.query.weight
    heard = []
    room.auxiliary = lambda records: heard.append(records) or 3.0 * weight.square().sum()
    with of_rooms(model) as term:
        next_token(model, x)
        extra = term()
    assert [record.path for record in heard[0]] == ["blocks.0.block.attention.connections"]
    (gradient,) = torch.autograd.grad(extra, weight)
    torch.testing.assert_close(gradient, 6.0 * weight)
    windows = Windows(prepare([TEXT], Bytes(), tmp_path), context=16, held_out=3, seed=0)
    expected = 3.0 * weight.square().sum().item()
    train(model, windows, Config(steps=1, batch=2, accumulate=2), tmp_path, job={})
    (row,) = read_metrics(tmp_path / METRICS, 1)[1:]
    assert row["added"] == pytest.approx(expected, rel=1e-6)
    with of_rooms(started_model()) as term:
        assert term() is None


@pytest.mark.parametrize("changes", [{"rate": 0}, {"rate": "x"}, {"rate": math.nan}, {"warmup": 1.5}, {"final": 2},
                                     {"beta1": 1}, {"beta2": -1}, {"epsilon": 0}, {"decay": -1}, {"clip": 0}], ids=str)
def test_an_optimizer_that_cannot_be_is_refused(changes):
    with pytest.raises(SenteiError):
        Optimizer(**changes)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch": True}, {"accumulate": 1.0}, {"precision": "float16"},
                                     {"precision": []}, {"seed": -1}, {"optimizer": {}}, {"save": 10**9}], ids=str)
def test_a_length_that_cannot_be_is_refused(changes):
    with pytest.raises(SenteiError):
        Config(**changes)
