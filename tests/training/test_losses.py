"""The experts' balance in training: a batch is its parts, biases move once a step, the metrics say how even it is."""

import math

import pytest
import torch

from sentei.axes.experts import Config as Room
from sentei.axes.experts import Experts
from sentei.axes.experts.balance import LOSSES, balancing
from sentei.axes.experts.gates import Choice, Noisy, Sigmoid, Softmax
from sentei.core.errors import SenteiError
from sentei.core.rules import Capacity, TopK
from sentei.core.tracing import trace
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.training.data import Bytes, Windows, prepare
from sentei.training.loop import METRICS, Config, Run, read_metrics, train
from sentei.training.losses import Balanced, Weights, next_token, of_rooms

ROOMS = {"switch": Room(rule=TopK(1), gate=Softmax(), unit=8),
         "sigmoid": Room(rule=TopK(2), gate=Sigmoid(), unit=8, shared=1),
         "choice": Room(rule=Capacity(0.5), gate=Choice(), unit=8),
         "noisy": Room(rule=TopK(2), gate=Noisy(), unit=8)}
ALL = Weights(switch=0.3, importance=0.7, z=0.02, sequence=0.4)
LINEAR = Weights(z=0.02, sequence=0.4)
TEXT = " ".join(f"{number} squared is {number * number}." for number in range(400))
SHAPES = [(8, 1), (4, 2), (1, 8)]


def model_of(kind: str) -> Transformer:
    """In fp64, with routers that are no longer even; the same at each call."""
    torch.manual_seed(0)
    shape = Shape(width=16, layers=2, heads=(2, 1), feed_forward=Routed(neurons=40, room=ROOMS[kind]))
    model = Transformer(shape).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_()
    return model


def rooms(model) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return Windows(prepare([TEXT], Bytes(), tmp_path_factory.mktemp("text")), context=16, held_out=3, seed=0)


def run_of(windows, tmp_path, kind, weights, batch=8, accumulate=1) -> tuple[Run, Balanced]:
    term = Balanced(weights)
    config = Config(steps=4, batch=batch, accumulate=accumulate)
    return Run(model_of(kind), windows, config, tmp_path, {}, [of_rooms, term]), term


@pytest.mark.parametrize("weights", [ALL, LINEAR], ids=["all", "linear"])
@pytest.mark.parametrize("kind", ["switch", "sigmoid", "choice"])
def test_a_batch_is_its_parts(windows, tmp_path, kind, weights):
    """Loss, what is added, every gradient, the loads and the numbers, in one pass, in two and in eight."""
    seen = []
    for batch, accumulate in SHAPES:
        run, term = run_of(windows, tmp_path, kind, weights, batch, accumulate)
        loss, added = run.gradients(0)
        seen.append((loss, added, [p.grad for p in run.named.values()], term.numbers(),
                     [room.counts for room in rooms(run.model) if room.bias is not None]))
    for other in seen[1:]:
        assert other[:2] == pytest.approx(seen[0][:2], rel=1e-12) and other[3] == pytest.approx(seen[0][3], rel=1e-12)
        for one, two in zip(seen[0][2], other[2], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)
        assert all(torch.equal(*pair) for pair in zip(seen[0][4], other[4], strict=True))


def test_what_is_added_is_the_sum_of_the_layers_losses_and_in_the_gradient(windows, tmp_path):
    run, _ = run_of(windows, tmp_path, "switch", ALL, 2, 4)
    _, added = run.gradients(0)
    model = model_of("switch")
    with balancing(model) as balance:
        loss = next_token(model, windows.batch(0, 8))
    expected = sum(weight * LOSSES[name](sums) for sums in balance.values() for name, weight in ALL.used().items())
    assert len(balance) == 2 and added == pytest.approx(expected.item(), rel=1e-12) and added > 0.5
    (loss + expected).backward()
    for (name, parameter), got in zip(model.named_parameters(), run.named.values(), strict=True):
        torch.testing.assert_close(got.grad, parameter.grad, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize(("weights", "passes"), [(ALL, 16), (LINEAR, 8), (Weights(), 8)], ids=["all", "linear", "none"])
def test_only_losses_that_are_no_mean_of_the_parts_need_a_second_pass(windows, tmp_path, weights, passes, monkeypatch):
    run, _ = run_of(windows, tmp_path, "switch", weights, 1, 8)
    done, forward = [], run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda tokens: done.append(1) or forward(tokens))
    run.gradients(0)
    assert len(done) == passes


def test_noise_is_drawn_alike_in_both_passes(windows, tmp_path):
    run, term = run_of(windows, tmp_path, "noisy", Weights(load=0.5, importance=0.5), 2, 4)
    state = torch.get_rng_state()
    run.gradients(0)
    for path, sums in term.whole.items():
        assert sums.load is not None and torch.equal(sums.load, term.seen[path].load)
        assert torch.equal(sums.counts, term.seen[path].counts)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    other, _ = run_of(windows, tmp_path, "noisy", Weights(), 2, 4)
    torch.set_rng_state(state)
    other.gradients(0)
    assert torch.equal(after, torch.get_rng_state()), "the pass for the sums draws nothing of the step's"


@pytest.mark.parametrize("weights", [ALL, Weights()], ids=["two passes", "one pass"])
def test_biases_move_once_a_step_by_the_loads_of_all_its_parts(windows, tmp_path, weights):
    run, _ = run_of(windows, tmp_path, "sigmoid", weights, 2, 4)
    run.model(windows.batch(7, 3)[:, :-1])  # what was read before the step does not count
    whole = model_of("sigmoid")
    whole(windows.batch(0, 8)[:, :-1])
    expected = [room.bias + 1e-3 * torch.sign(room.counts.double().mean() - room.counts) for room in rooms(whole)]
    run.advance(0)
    for room, bias in zip(rooms(run.model), expected, strict=True):
        torch.testing.assert_close(room.bias, bias, rtol=0, atol=1e-9, check_dtype=False)
        assert bias.abs().sum() > 0 and not room.counts.any()


def test_an_evaluation_moves_nothing(windows, tmp_path):
    run, _ = run_of(windows, tmp_path, "sigmoid", Weights())
    run.evaluate()
    assert not any(room.counts.any() or room.bias.any() for room in rooms(run.model))


def starved() -> Transformer:
    """The first expert of the first layer gets no token."""
    model = model_of("switch").float()
    rooms(model)[0].register_forward_pre_hook(lambda _, inputs: (
        inputs[0], torch.cat([inputs[1][..., :1] - 1e4, inputs[1][..., 1:]], -1), *inputs[2:]))
    return model


def test_metrics_say_how_even_a_step_was(windows, tmp_path):
    """The worst layer's violation and entropy, and all layers' unused and dead experts; from all parts of the step."""
    config = Config(steps=2, batch=40, accumulate=4)
    train(starved(), windows, config, tmp_path, job={}, terms=(Balanced(Weights()),))
    before, row, _ = read_metrics(tmp_path / METRICS, 2)
    model = starved()
    with trace(model) as records:
        model(windows.batch(0, 160)[:, :-1])
    loads = [record.selection.load().sum(0).tolist() for record in records if "experts" in record.path]
    assert [sum(load) for load in loads] == [2560, 2560] and loads[0][0] == 0 < min(loads[0][1:] + loads[1])
    assert row["violation"] == pytest.approx(max(max(load) for load in loads) / 512 - 1)
    assert row["entropy"] == pytest.approx(min(
        -sum(n / 2560 * math.log(n / 2560) for n in load if n) / math.log(5) for load in loads))
    assert (row["unused"], row["dead"], row["added"]) == (1, 1, 0) and "violation" not in before


def test_a_step_too_short_to_tell_calls_no_expert_dead(windows, tmp_path):
    train(starved(), windows, Config(steps=1, batch=4), tmp_path, job={}, terms=(Balanced(Weights()),))
    row = read_metrics(tmp_path / METRICS, 1)[1]
    assert row["unused"] >= 1 and row["dead"] == 0


def test_a_dense_model_has_no_balance(windows, tmp_path):
    model = Transformer(Shape(width=16, layers=1, heads=(2, 1), feed_forward=24))
    train(model, windows, Config(steps=1, batch=2), tmp_path, job={}, terms=(Balanced(Weights()),))
    assert set(read_metrics(tmp_path / METRICS, 1)[1]) == {"step", "loss", "added", "norm", "rate", "held_out"}


@pytest.mark.parametrize("changes", [{"switch": -1}, {"z": "1"}, {"load": True}, {"importance": float("nan")},
                                     {"sequence": float("inf")}], ids=str)
def test_weights_that_cannot_be_are_refused(changes):
    with pytest.raises(SenteiError, match="switch, importance, load, z, sequence as numbers from 0"):
        Weights(**changes)
