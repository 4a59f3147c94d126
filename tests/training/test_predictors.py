"""The predictors of Mixture-of-Depths in training: what they learn, what they leave alone, and what generation makes
of them.
"""

import pytest
import torch

from sentei.axes.depth import Config as Room
from sentei.axes.depth import Depth
from sentei.core.progress import Silent
from sentei.core.rules import Capacity
from sentei.core.tracing import trace
from sentei.model import Config as Shape
from sentei.model import Transformer
from sentei.training.data import Bytes, Windows, prepare
from sentei.training.job import load_model, run
from sentei.training.loop import Config, Optimizer, Run, train
from sentei.training.losses import next_token, of_predictors

TEXT = " ".join(f"{number} squared is {number * number}." for number in range(400))
DEPTH = "feed_forward: 24, depth: {room: depth, rule: {name: capacity, capacity: 0.5}}"


def model_of(rule=None) -> Transformer:
    """In fp64, with random gates and predictors; the same at each call."""
    torch.manual_seed(0)
    room = Room(rule=Capacity(0.5) if rule is None else rule)
    model = Transformer(Shape(width=16, layers=2, heads=(2, 1), feed_forward=24, depth=room)).double()
    for block in model.blocks:
        torch.nn.init.normal_(block.gate.weight)
        torch.nn.init.normal_(block.predictor.weight)
    return model


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return Windows(prepare([TEXT], Bytes(), tmp_path_factory.mktemp("text")), context=16, held_out=3, seed=0)


def test_what_is_added_is_the_sum_of_the_rooms_losses(windows):
    model, seen = model_of(), {}
    for block in model.blocks:
        block.register_forward_pre_hook(lambda room, given: seen.update({room: given[0].detach()}))
    with of_predictors(model) as added:
        next_token(model, windows.batch(0, 4))
    expected = sum(room.predictor_loss(x) for room, x in seen.items())
    assert len(seen) == 2 and added().item() == pytest.approx(expected.item(), rel=1e-12) and expected > 0.5


def test_the_rest_of_the_model_does_not_feel_it(windows):
    """Every other gradient has the same bits with the term and without."""
    gradients = []
    for taught in (True, False):
        model = model_of()
        with of_predictors(model) as added:
            loss = next_token(model, windows.batch(0, 4))
        (loss + added() if taught else loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        if "predictor" in name:
            assert gradient is None and gradients[0][name].abs().max() > 0
        else:
            assert torch.equal(gradient, gradients[0][name]), name


def test_without_something_to_teach_it_adds_nothing(windows):
    for model in (model_of(Capacity(1.0)), model_of().eval()):
        with of_predictors(model) as added:
            next_token(model, windows.batch(0, 2))
        assert added() is None
    model = model_of()
    with of_predictors(model):
        pass
    assert not any(room._forward_pre_hooks for room in model.blocks), "the term listens no longer"


def test_a_batch_is_its_parts(windows, tmp_path):
    seen = []
    for batch, accumulate in ((8, 1), (2, 4)):
        state = Run(model_of(), windows, Config(steps=2, batch=batch, accumulate=accumulate), tmp_path, {},
                     [of_predictors])
        seen.append((state.gradients(0)[1], [room.predictor.weight.grad for room in state.model.blocks]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-12)
    for one, two in zip(seen[0][1], seen[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)


def test_before_training_no_place_is_favoured_and_every_update_counts_about_1():
    shape = Shape(width=16, layers=2, heads=(2, 1), feed_forward=24, depth=Room(rule=Capacity(0.5)))
    model, tokens = Transformer(shape), torch.randint(257, (16, 32))
    for kept in choices(model, tokens):
        assert 0.3 < kept[:, :16].double().mean() < 0.7 and len(kept.unique(dim=0)) == 16
    assert all((room.gated(torch.randn(9, 16)) - 1).abs().max() < 0.5 for room in model.blocks)


def test_it_trains_in_bfloat16_with_weights_in_float32(windows, tmp_path):
    config = Config(steps=4, batch=4, accumulate=2, precision="bfloat16", optimizer=Optimizer(rate=1e-2, warmup=1))
    model = model_of().float()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = train(model, windows, config, tmp_path, job={}, terms=(of_predictors,))
    assert result["loss_after"] < result["loss_before"] - 0.1
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, before[name]), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `sentei train` makes of a tiny Mixture-of-Depths, in fp64."""
    folder = tmp_path_factory.mktemp("depth")
    (folder / "text.txt").write_text(TEXT)
    path = folder / "job.yaml"
    path.write_text(f"model: {{width: 16, layers: 2, heads: [2, 1], {DEPTH}}}\ndata: {{text: [text.txt], context: 32, "
                    "held_out: 3}\ntraining: {steps: 100, batch: 4, evaluate: 100, save: 100, optimizer: {rate: 3e-2, "
                    "warmup: 5}}\n")
    result = run(path, folder / "out", Silent())
    assert result["loss_after"] < result["loss_before"] - 0.5 and 0.4 < result["density"] < 1
    return load_model(folder / "out").double()


def choices(model: Transformer, tokens: torch.Tensor, cache: list | None = None) -> list[torch.Tensor]:
    """Which tokens each block keeps, bool [B, T]."""
    with torch.no_grad(), trace(model) as records:
        model(tokens, cache=cache)
    return [records.at(path)[0].selection.mask()[..., 0] for path in records.paths()
            if isinstance(model.get_submodule(path), Depth)]


def test_trained_predictors_say_what_the_rule_keeps(trained):
    tokens = torch.tensor([list(TEXT.encode()[start:start + 32]) for start in range(0, 1600, 100)])
    causal, along = choices(trained.eval(), tokens), choices(trained.train(), tokens)
    for guess, wanted in zip(causal, along, strict=True):
        assert 0.2 < guess.double().mean() < 0.8 and wanted.double().mean() == 0.5
        assert (guess == wanted).double().mean() > 0.7


def test_a_trained_choice_is_causal_and_generates_as_without_a_cache(trained):
    model, tokens = trained.eval(), torch.tensor([list(TEXT.encode()[:24]), list(TEXT.encode()[500:524])])
    later = tokens.clone()
    later[:, 15:] = 65
    for one, two in zip(choices(model, tokens), choices(model, later), strict=True):
        assert torch.equal(one[:, :15], two[:, :15]) and not one.all()
    cache = model.cache()
    parts = [choices(model, part, cache) for part in tokens.split([9, 1, 1, 13], 1)]
    for number, whole in enumerate(choices(model, tokens)):
        assert torch.equal(torch.cat([part[number] for part in parts], 1), whole)
    written = model.generate(tokens, 12)
    read = tokens
    with torch.no_grad():
        for _ in range(12):
            read = torch.cat([read, model(read)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, read)
