"""Decoder layers of every family whose few rows take one call, and what gives them their own forward back."""

import copy
from collections.abc import Callable

import pytest
import torch
from conversion.test_rows import TURNING, decoding, steps
from tiny import tiny_model
from torch import nn
from transformers import DynamicCache

from sentei.axes.connections import Config
from sentei.conversion import block, cache, linear, rows, wrapper
from sentei.conversion import native as native_rows
from sentei.conversion.block import NativeBlock
from sentei.conversion.families import FAMILIES
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.conversion.rows import NativeHeads
from sentei.core.rules import Threshold, TopK
from sentei.core.tracing import trace
from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The rows of every whole layer that native calls gave."""
    made, function = [], block.block.decoder_layers

    def passed(x, *others):
        outputs = function(x, *others)
        made.extend(x.shape[1] for _ in outputs)
        return outputs

    monkeypatch.setattr(block.block, "decoder_layers", passed)
    return made


# The families whose layers are a norm, attention, a norm and a gated MLP, and of how many layers the heads turn.
BLOCKS = {family: count for family, count in TURNING.items() if family != "gemma3_text"}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_after_a_cache_take_one_call_a_layer(family, passes, monkeypatch):
    model, tokens = decoding(family, monkeypatch, whole=True), torch.arange(9)[None] * 7 + 3
    before, exact = steps(tiny_model(family), tokens), steps(tiny_model(family).double(), tokens)
    blocks = [module for module in model.modules() if isinstance(module, NativeBlock)]
    assert len(blocks) == BLOCKS.get(family, 0)
    passes.clear()
    after = steps(model, tokens)
    assert sorted(passes) == sorted([1, 2, 1] * len(blocks)), "the first five rows come before there is a cache"
    assert (after - exact).norm() <= max(2 * (before - exact).norm(), torch.finfo(torch.float32).eps * exact.norm())
    convert(model, Plan())
    assert not any(isinstance(module, NativeBlock) or "parts" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_block_whose_parts_were_altered_takes_its_own_forward(passes, monkeypatch):
    """A hook anywhere in it is called, and another module or forward counts."""
    model, tokens = decoding("llama", monkeypatch, whole=True), torch.arange(9)[None] * 7 + 3
    expected, first = steps(model, tokens), model.model.layers[0]
    for path in ("input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm",
                 "mlp", "mlp.act_fn", "self_attn.connections", "mlp.up_proj", "mlp.down_proj"):
        seen = []
        for hook in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(first.get_submodule(path), hook)(
                lambda *_, seen=seen: seen.append(1))
            passes.clear()
            torch.testing.assert_close(steps(model, tokens), expected)
            assert len(passes) == 3 * 2 and len(seen) == 4
            seen.clear()
            handle.remove()
    own = copy.deepcopy(first.mlp)
    own.down_proj.weight.zero_()
    first.mlp, kept = own, first.mlp
    passes.clear()
    assert not torch.allclose(steps(model, tokens), expected) and len(passes) == 3 * 2
    first.mlp = kept
    first.self_attn.o_proj.weight.data = first.self_attn.o_proj.weight.data.t().contiguous().t()
    passes.clear()
    torch.testing.assert_close(steps(model, tokens), expected)
    assert len(passes) == 3 * 2, "weights that do not lie together"
    torch.nn.utils.parametrize.register_parametrization(first.post_attention_layernorm, "weight", torch.nn.Identity())
    passes.clear()
    torch.testing.assert_close(steps(model, tokens), expected)
    assert len(passes) == 3 * 2, "a weight that is computed"
    model.train()
    passes.clear()
    steps(model, tokens)
    assert not passes


@torch.no_grad()
def test_weights_that_became_sparse_are_left_to_torch(passes, monkeypatch):
    model, tokens = decoding("llama", monkeypatch, whole=True), torch.arange(9)[None] * 7 + 3
    expected, part = steps(model, tokens), model.model.layers[0].mlp.up_proj
    part.weight = nn.Parameter(part.weight.detach().to_sparse_csr(), requires_grad=False)
    for plan in (None, Plan.everywhere((0, 1, 2), "connections", Config(decode=Threshold(0.0)))):
        if plan is not None:
            convert(model, plan)
        passes.clear()
        torch.testing.assert_close(steps(model, tokens), expected)
        assert len(passes) == 3 * 2


@pytest.fixture
def pair(monkeypatch) -> list[nn.Module]:
    """A model whose layers choose pages in one call each, and the same with smaller calls."""
    right, made = native_rows.install, []
    monkeypatch.setattr(native_rows, "install", lambda model, **asked: right(model, most_rows=8, many_rows=0))
    for kinds in (native_rows.KINDS, rows.KINDS):
        monkeypatch.setattr(native_rows, "KINDS", kinds)
        model = tiny_model("llama")
        choosing = Config(tile=(4, 4), window=20, decode=TopK(4))
        made.append(convert(model, Plan.everywhere(prunable_layers(model), "connections", choosing)))
    return made


@torch.no_grad()
def written(model: nn.Module, kind: Callable = DynamicCache, **more) -> torch.Tensor:
    """The logits of a row, of two, and of one after 120 tokens, and the keys of the last layer."""
    held, tokens = kind(config=model.config), torch.arange(248).view(2, 124) * 7 % 60 + 3
    parts = tokens.split([120, 1, 2, 1], 1)
    logits = []
    for end, part in zip((120, 121, 123, 124), parts, strict=True):
        named = {name: value[:, :end] if isinstance(value, torch.Tensor) else value for name, value in more.items()}
        logits.append(model(part, past_key_values=held, use_cache=True, **named).logits)
    return torch.cat([torch.cat(logits[1:], 1).flatten(), held.layers[-1].keys.flatten()])


PADDED = torch.ones(2, 124, dtype=torch.int64)
PADDED[1, :37] = 0


@pytest.mark.parametrize("more", [{}, {"attention_mask": PADDED}], ids=["plain", "padded"])
def test_a_layer_chooses_as_the_smaller_calls_do(more, pair, passes):
    model, other = pair
    assert torch.equal(written(model, **more), written(other, **more)) and sorted(passes) == [1] * 6 + [2] * 3
    passes.clear()
    with trace(model) as records:
        assert torch.equal(written(model, **more), written(other, **more)) and not passes
    assert 0 < records.at("model.layers.1.self_attn.connections")[-1].selection.density() < 0.9


def test_whoever_listens_gets_the_same_bits_whatever_was_measured_faster(monkeypatch):
    """Here few rows of the layers in one call, and of none of their parts."""
    monkeypatch.setattr(linear, "_gains", lambda modules, kind_of, ways, rows: {
        kind_of(module): 1.0 + (rows > 8 or isinstance(module, NativeBlock)) for module in modules})
    model = tiny_model("llama")
    convert(model, Plan.everywhere(prunable_layers(model), "connections", Config(tile=(4, 4), decode=TopK(4))))
    heard = copy.deepcopy(model)
    with trace(heard) as records:
        found = written(heard)
    assert torch.equal(written(model), found) and records
    assert sum(isinstance(module, NativeBlock) for module in model.modules()) == 3


def in_rooms(name: str, value: object) -> Callable[[nn.Module], None]:
    """Gives the attribute of every room that value."""
    def change(model: nn.Module) -> None:
        for room in wrapper.rooms(model).values():
            setattr(room, name, value)
    return change


class Watched(DynamicCache):
    """A cache that does something else as well."""

    def update(self, *states, **named):
        return tuple(state * 0.5 for state in super().update(*states, **named))


def cache_of_ours(config) -> DynamicCache:
    """One that was made for another attention than the one that meets it."""
    made = DynamicCache(config=config)
    cache.fill(made, (0, 1, 2))
    return made


@pytest.mark.parametrize("change, more", [
    (in_rooms("impl", "eager"), {}), (in_rooms("causal", False), {}),
    (lambda model: wrapper.use(model, "sdpa"), {"kind": cache_of_ours}),
    (lambda model: None, {"is_causal": False}), (lambda model: None, {"kind": Watched}),
    (lambda model: [setattr(layer.self_attn, "scaling", None) for layer in model.model.layers], {}),
], ids=["another kernel", "not causal", "another attention", "to later tokens", "a cache that does more", "no scale"])
def test_what_one_call_does_not_do_is_done_by_the_smaller_ones(change, more, pair, passes):
    model, other = pair
    change(model), change(other)
    assert torch.equal(written(model, **more), written(other, **more)) and not passes


def test_a_cache_that_is_watched_is_asked(pair, passes):
    model, other = pair
    seen = []

    class Listening(DynamicCache):
        def __init__(self, **named):
            super().__init__(**named)
            own = self.update
            self.update = lambda *states, **more: seen.append(1) or own(*states, **more)

    def plain(**named):
        held = Listening(**named)
        held.__class__ = DynamicCache
        return held

    assert torch.equal(written(model, plain), written(other, plain)) and not passes and len(seen) == 2 * 3 * 4


@pytest.mark.parametrize("tile", [1, 2, 64])
def test_a_room_of_any_tile_is_measured_with_the_rows_it_reads(tile, monkeypatch):
    model = tiny_model("llama")
    config = Config(tile=(tile, 4), decode=TopK(2))
    convert(model, Plan.everywhere(prunable_layers(model), "connections", config))
    choices = native_rows.install(model, most_rows=8, many_rows=0)
    assert [choice.most_rows for choice in choices[-3:]] == [8] * 3, choices[-1].reason


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["residual", "order"])
def test_a_layer_that_joins_otherwise_is_left(wrong, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs)
        hidden = attended if wrong == "residual" else hidden_states + attended
        if wrong == "order":
            return hidden + self.post_attention_layernorm(self.mlp(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model = decoding("llama", monkeypatch, whole=True)
    assert any(isinstance(module, NativeHeads) for module in model.modules())
    assert not any(isinstance(module, NativeBlock) for module in model.modules())
