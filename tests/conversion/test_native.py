"""What runs natively in a model converted with any room, what of it is proven anew, and how it is taken back."""

import copy

import pytest
import torch
from tiny import tiny_model

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.weights import Config as Weights
from sentei.conversion import native as conversion
from sentei.conversion import rows
from sentei.conversion.altered import Proofs
from sentei.conversion.native import PROVEN, is_installed
from sentei.conversion.plan import Entry, Plan, complete, convert, place
from sentei.conversion.rows import NativeGated, NativeHeads, NativeNorm
from sentei.core.rules import Fixed, Threshold, TopK
from sentei.kernels import native

pytestmark = [pytest.mark.skipif(bool(native.missing()), reason=native.missing()), pytest.mark.usefixtures("always")]
THIN = Entry(layer=1, room="weights", config=Weights(rule=TopK(64), saliency="magnitude"))
GONE = Entry(layer=2, room="depth", config=Depth(rule=Fixed(()), part="network"))
CHOOSING = Entry(layer=0, room="connections", config=Connections(rule=Threshold(0.1)))
PAGED = Entry(layer=0, room="connections", config=Connections(decode=Threshold(0.0)))
TOKENS = torch.arange(12)[None] * 7 + 3


@pytest.fixture
def proven(monkeypatch) -> list[str]:
    """The kinds of the modules that were proven."""
    made = []

    def noted(kind):
        def prove(module, mixin):
            made.append(mixin.__name__)
            return kind.prove(module, mixin)

        return kind._replace(prove=prove)

    monkeypatch.setattr(conversion, "KINDS", tuple(map(noted, conversion.KINDS)))
    return made


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def native_of(model) -> dict[str, int]:
    """The native modules by kind."""
    return {kind.__name__: sum(isinstance(module, kind) for module in model.modules())
            for kind in (NativeHeads, NativeGated, NativeNorm)}


@pytest.mark.parametrize("plan, gated", [((THIN,), 3), ((GONE,), 2), ((CHOOSING,), 3), ((THIN, GONE, CHOOSING), 2)],
                         ids=["weights", "depth", "connections", "all"])
def test_layers_run_natively_whatever_the_rooms_and_the_empty_plan_takes_it_back(plan, gated):
    model = tiny_model("llama")
    dense = logits(model)
    expected = logits(place(model, Plan(plan)))
    assert not is_installed(model)
    found = logits(convert(model, Plan(plan)))
    norms = 6 if GONE in plan else 7
    assert native_of(model) == {"NativeHeads": 3, "NativeGated": gated, "NativeNorm": norms}
    torch.testing.assert_close(found, expected)
    assert torch.allclose(found, dense, atol=1e-3) == (plan == (CHOOSING,))
    assert torch.equal(logits(convert(model, Plan())), dense) and not is_installed(model)


def test_a_model_that_has_the_shapes_already_is_completed():
    whole = logits(convert(tiny_model("llama"), Plan((THIN, CHOOSING))))
    model = tiny_model("llama")
    thin = place(tiny_model("llama"), Plan((THIN,))).model.layers[1].mlp
    model.model.layers[1].mlp = thin
    found = logits(complete(model, Plan((THIN, CHOOSING))))
    assert torch.equal(found, whole) and native_of(model)["NativeGated"] == 3
    complete(model, Plan((THIN,)))
    assert not hasattr(model.model.layers[0].self_attn, "connections") and native_of(model)["NativeGated"] == 3


def test_an_attention_function_that_is_told_of_a_window_is_still_told():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    told = []

    def attend(*inputs, **named):
        told.append("sliding_window" in named)
        return sdpa_attention_forward(*inputs, **named)

    AttentionInterface.register("told", attend)
    model = convert(tiny_model("mistral"), Plan((THIN,)))
    assert native_of(model)["NativeHeads"] == 3
    model.config._attn_implementation = "told"
    logits(model)
    assert told == [True] * 3


def test_what_was_proven_is_not_proven_again(proven):
    model = convert(tiny_model("llama"), Plan((THIN, PAGED)))
    first = sorted(proven)
    assert first == sorted(3 * ["NativeHeads", "NativeGated"] + 7 * ["NativeNorm"] + ["NativeBlock"])
    expected = logits(model)
    proven.clear()
    convert(model, Plan())
    assert torch.equal(logits(convert(model, Plan((THIN, PAGED)))), expected)
    assert proven == ["NativeGated"], "the thinner network was built anew"


@pytest.mark.parametrize("change, again", [
    (lambda layer: layer.mlp.up_proj.weight.data.mul_(2), []),
    (lambda layer: torch.nn.init.ones_(layer.mlp.up_proj.weight), ["NativeGated"]),
    (lambda layer: setattr(layer.mlp.up_proj, "weight", torch.nn.Parameter(torch.ones(96, 64))), ["NativeGated"]),
    (lambda layer: setattr(layer.mlp, "act_fn", torch.nn.SiLU()), ["NativeGated"]),
    (lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 1e-3), ["NativeNorm"]),
    (lambda layer: setattr(layer.self_attn, "q_proj", copy.deepcopy(layer.self_attn.q_proj)), ["NativeHeads"]),
], ids=["weights behind torch's back", "weights in place", "other weights", "activation", "epsilon", "a part"])
def test_what_was_altered_is_proven_again(change, again, proven):
    model = convert(tiny_model("llama"), Plan((GONE,)))
    convert(model, Plan())
    change(model.model.layers[1])
    proven.clear()
    dense = logits(place(model, Plan((GONE,))))
    torch.testing.assert_close(logits(convert(model, Plan((GONE,)))), dense)
    assert proven == again


def test_a_refusal_is_remembered_until_the_cause_is_gone(proven):
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    for _ in range(2):
        convert(model, Plan((GONE,)))
        assert native_of(model)["NativeGated"] == 1
    assert proven.count("NativeGated") == 2
    model.model.layers[1].mlp.act_fn = torch.nn.SiLU()
    convert(model, Plan((GONE,)))
    assert native_of(model)["NativeGated"] == 2


def test_proofs_are_no_part_of_a_copy():
    model = convert(tiny_model("llama"), Plan((GONE,)))
    assert len(model.__dict__[PROVEN].found) == 11
    twin = copy.deepcopy(model)
    assert isinstance(twin.__dict__[PROVEN], Proofs) and not twin.__dict__[PROVEN].found


def test_a_module_that_is_gone_is_forgotten():
    model = convert(tiny_model("llama"), Plan((THIN,)))
    known = len(model.__dict__[PROVEN].found)
    convert(model, Plan())
    assert len(model.__dict__[PROVEN].found) == known - 1, "the thinner network and what it was made of"


@pytest.mark.parametrize("before", [Plan(), Plan((CHOOSING, THIN))], ids=["dense", "converted"])
def test_a_failure_at_the_end_leaves_the_model_as_it_was(before, monkeypatch):
    model = convert(tiny_model("llama"), before)
    expected, kinds = logits(model), native_of(model)
    right, asked = conversion.install, []

    def fails_once(given):
        asked.append(1)
        if len(asked) == 1:
            right(given)
            raise KeyboardInterrupt
        return right(given)

    monkeypatch.setattr(conversion, "install", fails_once)
    with pytest.raises(KeyboardInterrupt):
        convert(model, Plan((GONE,)))
    assert torch.equal(logits(model), expected) and native_of(model) == kinds


def test_heads_made_natively_go_to_the_room_or_to_transformers_own_attention(monkeypatch):
    expected, calls, right = logits(tiny_model("llama")), [], rows.rows.heads
    monkeypatch.setattr(rows.rows, "heads", lambda *inputs: calls.append(1) or right(*inputs))
    model = convert(tiny_model("llama"), Plan((Entry(layer=0, room="connections", config=Connections()),)))
    calls.clear()
    torch.testing.assert_close(logits(model), expected)
    assert len(calls) == 3
