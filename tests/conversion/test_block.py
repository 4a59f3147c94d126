"""Decoder layers of every family whose few rows take one call, and what gives them their own forward back."""

import copy

import pytest
import torch
from conversion.test_rows import TURNING, decoding, steps
from tiny import tiny_model

from sentei.conversion import block
from sentei.conversion.block import NativeBlock
from sentei.conversion.families import FAMILIES
from sentei.conversion.plan import Plan, convert
from sentei.conversion.rows import NativeHeads
from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The rows of the native calls of whole layers that gave something."""
    made, function = [], block.block.block

    def passed(x, *others):
        output = function(x, *others)
        made.extend([] if output is None else [x.shape[1]])
        return output

    monkeypatch.setattr(block.block, "block", passed)
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
    model.train()
    passes.clear()
    steps(model, tokens)
    assert not passes


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
