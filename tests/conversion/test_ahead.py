"""Layers that run ahead of the model's loop: the bits of the smaller calls whatever the loop does, nothing kept."""

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from conversion.test_block import PADDED, pair, written  # noqa: F401  (a fixture)
from torch import nn
from transformers import DynamicCache

from sentei.conversion import ahead, block
from sentei.core.errors import RuleError
from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Of how many layers the native calls were."""
    made, function = [], block.block.decoder_layers

    def counted(*given):
        outputs = function(*given)
        made.append(len(outputs))
        return outputs

    monkeypatch.setattr(block.block, "decoder_layers", counted)
    return made


@torch.no_grad()
def tokens(model: nn.Module, count: int, held: DynamicCache | None = None) -> tuple[torch.Tensor, DynamicCache]:
    """The logits of so many tokens, one by one, after 120 or what a cache holds."""
    if held is None:
        held = DynamicCache(config=model.config)
        model(torch.arange(120)[None] * 7 % 60 + 3, past_key_values=held, use_cache=True)
    rows = [model(torch.tensor([[5 + i]]), past_key_values=held, use_cache=True).logits for i in range(count)]
    return torch.cat(rows, 1), held


def test_layers_that_followed_one_another_are_one_call(pair, calls):  # noqa: F811
    model, other = pair
    found, held = tokens(model, 3)
    assert torch.equal(found, tokens(other, 3)[0]) and calls == [1, 1, 1, 3, 3]
    assert not ahead._MADE, "rows that are gone"
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None, "nothing of a token keeps its cache"


@pytest.mark.parametrize("more", [{}, {"attention_mask": PADDED}], ids=["plain", "padded"])
def test_in_inference_mode_too(more, pair, calls):  # noqa: F811
    model, other = pair
    with torch.inference_mode():
        assert torch.equal(written(model, **more), written(other, **more)) and calls == [1, 1, 1, 3, 3]


def other_rows(module, inputs, output):
    """A hook: what transformers' own loop might do between two layers."""
    return output * 0.5


def changed_rows(module, inputs, output):
    """Another, which leaves the tensor what it is."""
    output.mul_(0.5)


@pytest.mark.parametrize("hook", [other_rows, changed_rows])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_not_foreseen_is_computed(hook, mode, pair, calls):  # noqa: F811
    model, other = pair
    tokens(model, 2)
    calls.clear()
    for one in pair:
        one.model.layers[1].register_forward_hook(hook)
    with mode():
        assert torch.equal(tokens(model, 4)[0], tokens(other, 4)[0])
    assert calls == [3, 1] + 3 * [2, 1], "who proves wrong is not guessed again"


def walked(model: nn.Module, held: DynamicCache, *, mask_at: int = -1, gradient_from: int = 3) -> torch.Tensor:
    """The last layer's rows of one more token by a loop of one's own.

    Args:
        mask_at: the layer that is given a mask, of everything.
        gradient_from: the first layer that is called where gradients are wanted.
    """
    position = held.get_seq_length()
    with torch.no_grad():
        rows = model.model.embed_tokens(torch.tensor([[9]]))
        turns = model.model.rotary_emb(rows, torch.tensor([[position]]))
    mask = torch.ones(1, position + 1, dtype=torch.bool)
    for i, layer in enumerate(model.model.layers):
        with torch.set_grad_enabled(i >= gradient_from):
            rows = layer(rows, attention_mask=mask if i == mask_at else None, past_key_values=held,
                         position_embeddings=turns)
    return rows


def test_a_layer_with_another_mask_than_its_neighbours_computes(pair, calls):  # noqa: F811
    held = [tokens(one, 3)[1] for one in pair]
    calls.clear()
    for _ in range(3):
        assert torch.equal(*(walked(one, cache, mask_at=1) for one, cache in zip(pair, held, strict=True)))
    assert calls == [3, 1, 1] + 2 * [1, 1, 1]


def test_a_layer_that_wants_gradients_has_them(pair):  # noqa: F811
    model, other = pair
    rows = [walked(one, tokens(one, 3)[1], gradient_from=1) for one in pair]
    assert torch.allclose(*rows)
    for one in rows:
        one.sum().backward()
    found, expected = (one.model.layers[1].mlp.down_proj.weight.grad for one in pair)
    assert torch.allclose(found, expected) and expected.any()
    assert model.model.layers[0].mlp.down_proj.weight.grad is None


def test_weights_that_come_just_before_a_layer_is_called_are_read(pair, calls):  # noqa: F811
    """As where layers take turns in one room: by a hook, or a forward around the layer's own."""
    for one in pair:
        first, last = one.model.layers[1:]
        early, weight, own = first.mlp.down_proj.weight, last.mlp.down_proj.weight, last.forward
        before, kept = early.detach().clone(), weight.detach().clone()

        def bring(module, *inputs, room=early, kept=before):
            room.data.copy_(kept * calls_of[0])

        def forward(*inputs, room=weight, kept=kept, own=own, **named):
            room.data.copy_(kept / calls_of[0])
            return own(*inputs, **named)

        first.register_forward_pre_hook(bring)
        last.forward = forward
    found = []
    for one in pair:
        calls_of, held = [1.0], None
        rows = []
        for _ in range(4):
            calls_of[0] += 1
            made, held = tokens(one, 1, held)
            rows.append(made)
        found.append(torch.cat(rows))
    assert torch.equal(*found) and max(calls) == 1


def test_layers_of_one_place_in_a_cache_take_turns(pair):  # noqa: F811
    for one in pair:
        one.model.layers[1].self_attn.layer_idx = 0
    assert torch.equal(*(tokens(one, 5)[0] for one in pair))


def test_a_cache_that_changes_between_two_layers_is_seen(pair, calls):  # noqa: F811
    for one in pair:
        one.model.layers[0].register_forward_hook(
            lambda module, args, kwargs, output: kwargs["past_key_values"].layers[1].crop(-1), with_kwargs=True)
    model, other = pair
    assert torch.equal(tokens(model, 4)[0], tokens(other, 4)[0]) and calls[:6] == [1, 1, 1, 3, 1, 1]


def test_a_token_that_is_given_up_leaves_a_cache_as_the_loop_does(pair):  # noqa: F811
    held = [tokens(one, 2)[1] for one in pair]

    def give_up(*given):
        raise KeyboardInterrupt

    for one, cache in zip(pair, held, strict=True):
        hook = one.model.layers[0].register_forward_hook(give_up)
        with pytest.raises(KeyboardInterrupt):
            tokens(one, 1, cache)
        hook.remove()
    lengths = [[layer.get_seq_length() for layer in cache.layers] for cache in held]
    assert lengths[0] == lengths[1] == [123, 122, 122]
    for cache in held:
        cache.layers[0].crop(-1)
    assert torch.equal(*(tokens(one, 3, cache)[0] for one, cache in zip(pair, held, strict=True)))


def test_scores_that_are_none_are_told_by_the_layer_that_has_them(pair):  # noqa: F811
    model, other = pair
    held = [tokens(one, 2)[1] for one in pair]
    for one, cache in zip(pair, held, strict=True):
        one.model.layers[1].self_attn.q_proj.weight.data.fill_(torch.nan)
        with pytest.raises(RuleError, match="NaN or infinity"):
            tokens(one, 1, cache)
    assert held[0].layers[0].get_seq_length() == 123 and held[0].layers[1].get_seq_length() == 122


def change_epsilon(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_storage(model: nn.Module) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data * 0.5


def change_form(model: nn.Module) -> None:
    """The same numbers, of which another part is read."""
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.data = weight.data.t()


def change_module(model: nn.Module) -> None:
    own = model.model.layers[2].mlp.up_proj
    model.model.layers[2].mlp.up_proj = copy.deepcopy(own)
    model.model.layers[2].mlp.up_proj.weight.data *= 0.5


def change_numbers(model: nn.Module) -> None:
    model.model.layers[0].mlp.gate_proj.weight.data *= 0.5


@pytest.mark.parametrize("change", [change_epsilon, change_storage, change_form, change_module, change_numbers])
def test_what_was_prepared_is_asked_again_where_a_weight_changed(change: Callable, pair):  # noqa: F811
    before = tokens(pair[0], 3)[0]
    for one in pair:
        change(one)
    found = tokens(pair[0], 3)[0]
    assert torch.equal(found, tokens(pair[1], 3)[0]) and not torch.equal(found, before)


def test_a_copy_learns_its_own_layers(pair, calls):  # noqa: F811
    model, other = pair
    expected = tokens(model, 3)[0]
    made = copy.deepcopy(model)
    made.model.layers[1].mlp.down_proj.weight.data.zero_(), other.model.layers[1].mlp.down_proj.weight.data.zero_()
    calls.clear()
    assert torch.equal(tokens(made, 3)[0], tokens(other, 3)[0]) and calls[-1] == 3
    assert torch.equal(tokens(model, 3)[0], expected)


def test_threads_do_not_take_each_others_rows(pair):  # noqa: F811
    model = pair[0]
    expected, found = tokens(model, 30)[0], []
    threads = [threading.Thread(target=lambda: found.append(tokens(model, 30)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(one, expected) for one in found)


def test_rows_that_nobody_asked_for_keep_no_cache(pair):  # noqa: F811
    """The last layer's, and those of a token that ended early."""
    model, kept = pair[0], []
    held = tokens(model, 3)[1]
    for layer in (model.model.layers[-1], model.model.layers[0]):
        hook = layer.register_forward_hook(
            lambda module, inputs, output: kept.append(output) or output / (len(kept) - 1))
        with contextlib.suppress(ZeroDivisionError):
            tokens(model, 1, held)
        hook.remove()
    assert len(kept) == 2 and ahead._MADE
    gone = [weakref.ref(held), *map(weakref.ref, held.layers)]
    del held
    gc.collect()
    assert not any(one() for one in gone)


def test_rows_are_kept_and_saved_as_any_tensor(pair, tmp_path, calls):  # noqa: F811
    held, states = [tokens(one, 3)[1] for one in pair], ([], [])
    for one, cache, kept in zip(pair, held, states, strict=True):
        for layer in one.model.layers:
            layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        tokens(one, 1, cache)
    assert calls[-1] == 3 and all(torch.equal(one, own) for one, own in zip(*states, strict=True))
    torch.save(states[0], tmp_path / "states.pt")
    assert torch.equal(torch.load(tmp_path / "states.pt", weights_only=True)[2], states[1][2])
    copy.deepcopy(states[0])


def test_a_model_that_was_asked_for_hidden_states_goes_on_natively(pair, calls):  # noqa: F811
    """transformers leaves hooks on its attentions where it was."""
    held = [tokens(one, 3)[1] for one in pair]
    with torch.no_grad():
        states = [one(torch.tensor([[9]]), past_key_values=cache, output_hidden_states=True).hidden_states
                  for one, cache in zip(pair, held, strict=True)]
    assert all(torch.equal(one, own) for one, own in zip(*states, strict=True)) and len(states[0]) == 4
    assert pair[0].model.layers[0].self_attn._forward_hooks
    calls.clear()
    assert torch.equal(*(tokens(one, 4, cache)[0] for one, cache in zip(pair, held, strict=True)))
    assert calls[-2:] == [3, 3]
