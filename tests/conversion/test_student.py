"""A pruned model of its own: it computes what the converted one does, and never touches the dense one."""

import pytest
import torch
from tiny import tiny_model

from sentei.axes import depth, experts, heads, weights
from sentei.axes.rank import Config as Rank
from sentei.conversion import adapters, native
from sentei.conversion.layers import layers_of, originals
from sentei.conversion.plan import Entry, Plan, convert, place, wanted
from sentei.conversion.rooms.heads import FOLD
from sentei.conversion.statistics import Statistics
from sentei.conversion.student import adapted, settled, student_of
from sentei.core.rules import Fixed, TopK

TOKENS = torch.arange(3, 67)[None]
PLAN = Plan((Entry(layer=0, room="weights", config=weights.Config(rule=TopK(32), saliency="obs")),
             Entry(layer=0, room="heads", config=heads.Config(num_kv_heads=1, merge="joint")),
             Entry(layer=1, room="experts", config=experts.Config(rule=TopK(1), unit=32, shared=1)),
             Entry(layer=1, room="depth", config=depth.Config(rule=Fixed(()), part="attention")),
             Entry(layer=2, room="experts", config=experts.Config(rule=TopK(48), unit=1))))


@torch.no_grad()
def seen_by(model) -> Statistics:
    """What the plan's rooms want, of one row."""
    layers = layers_of(model)
    statistics = Statistics.empty(layers, wanted(PLAN))
    handles = statistics.listen(layers)
    model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return statistics


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def parts(request):
    """The dense model, what it gave before, the student, its dtypes, and what the converted model gave."""
    model = tiny_model("llama").to(request.param)
    before, seen = logits(model), seen_by(model)
    converted = logits(place(model, PLAN, seen))
    convert(model, Plan())
    return model, before, *student_of(model, PLAN, seen), converted


def test_it_computes_what_the_converted_model_does(parts):
    model, _, student, _, converted = parts
    assert student.dtype == torch.float32 and not native.is_installed(student)
    if model.dtype == torch.float32:
        assert torch.equal(logits(student), converted)
    else:  # on the mean: here and there rounding chooses another neuron
        assert (logits(student) - converted).abs().mean() < 0.03 * converted.abs().mean()


def test_the_dense_model_is_as_it_was(parts):
    model, before, *_ = parts
    assert torch.equal(logits(model), before) and not originals(model)


def test_it_stands_alone_and_shares_what_it_can(parts):
    model, _, student, *_ = parts
    assert not originals(student) and student.config is not model.config
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert not any(FOLD in vars(module) for module in student.modules())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    shared = [parameter.data_ptr() in own for parameter in student.parameters()]
    assert any(shared) == (model.dtype == torch.float32)
    assert not {id(parameter) for parameter in model.parameters()} & {id(other) for other in student.parameters()}


def test_every_linear_layer_that_is_called_learns_and_is_folded_in_the_own_dtypes(parts):
    model, before, student, dtypes, converted = parts
    names = set(student.state_dict())
    paths = adapted(student, Rank(rank=2))
    assert "model.layers.2.mlp.gate_proj" in paths and "model.layers.2.mlp.up_proj" not in paths
    assert {path.rsplit(".", 1)[-1] for path in paths} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                                          "up_proj", "down_proj"} and len(paths) == 15
    for adapter in adapters.adapters_of(student).values():
        torch.nn.init.normal_(adapter.b, std=0.2)
    student(input_ids=TOKENS).logits.square().sum().backward()
    assert all(adapter.a.grad.abs().max() > 0 and adapter.b.grad.abs().max() > 0
               for adapter in adapters.adapters_of(student).values())
    learned = logits(student)
    assert (learned - converted).abs().max() > 0.1
    settled(student, dtypes)
    assert set(student.state_dict()) == names
    assert {name: tensor.dtype for name, tensor in student.named_parameters()} == {
        name: dtypes[name] for name, _ in student.named_parameters()}
    assert student.model.layers[1].mlp.router.dtype == torch.float32
    close = 1e-4 if model.dtype == torch.float32 else 0.06
    assert (logits(student) - learned).abs().mean() < close * learned.abs().mean()
    assert torch.equal(logits(model), before)
