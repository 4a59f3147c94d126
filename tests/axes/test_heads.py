"""heads: the map from query heads to key/value heads, pooling, the cache, and what it costs."""

import pytest
import torch
from oracle import masked_attention
from torch import nn

from sentei.axes.heads import Cache, Config, Heads, Shared, SharedAttention, cache_bytes, from_dense, share_saved
from sentei.core.definition import apply
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.rules import TopK
from sentei.core.tracing import trace

GROUPS = pytest.mark.parametrize("groups", [1, 2, 3, 6], ids=["MQA", "two", "three", "MHA"])
KINDS = pytest.mark.parametrize("kind", ["causal", "bidirectional", "padded"])
LENGTHS = torch.tensor([[2, 7], [0, 5]])


def qkv(groups: int, tokens: int = 7, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, tokens, heads, width, dtype=dtype) for heads, width in ((6, 4), (groups, 4), (groups, 3))]


def pairs_of(kind: str, heads: int, tokens: int = 7) -> torch.Tensor:
    """Bool [2, heads, T, T]: what is permitted."""
    pairs = torch.ones(2, heads, tokens, tokens, dtype=torch.bool)
    if kind != "bidirectional":
        pairs = pairs.tril()
    if kind == "padded":
        for row, (start, stop) in enumerate(LENGTHS.tolist()):
            pairs[row, :, :, :start] = pairs[row, :, :, stop:] = False
    return pairs


def outcome(function, inputs) -> list[torch.Tensor]:
    """The output and the gradients of one fixed loss of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    loss = (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum()
    return [output, *torch.autograd.grad(loss, leaves)]


def layer_of(groups: int, **settings) -> SharedAttention:
    sizes = {"width": 12, "num_heads": 6, "bias": True} | settings
    return SharedAttention(Config(num_kv_heads=groups), **sizes).double()


@GROUPS
@KINDS
def test_is_the_definition_with_a_key_value_head_as_the_candidate(groups, kind):
    """Query heads are queries, and candidate g attends with the keys and values of head g."""
    inputs, pairs = qkv(groups), pairs_of(kind, 1)
    room = Heads(Config(), causal=kind != "bidirectional")
    lengths = (LENGTHS,) if kind == "padded" else ()
    with trace(room) as records:
        room(*inputs, *lengths)
    selection = records[0].selection
    assert selection.ids[0, :, 0].tolist() == [h * groups // 6 for h in range(6)]
    assert selection.permitted.unique().tolist() == [groups] and selection.density() == 1 / groups

    def by_definition(query, key, value):
        def head(b, g):
            return lambda x: masked_attention(x.view(1, 7, 1, 4), key[b:b + 1, :, g:g + 1], value[b:b + 1, :, g:g + 1],
                                              pairs[b:b + 1], 0.5)[0].flatten()
        rows = []
        for b in range(2):
            one = Shared()(torch.zeros(6, groups))
            rows.append(apply(one, [head(b, g) for g in range(groups)], query[b].transpose(0, 1).flatten(1)))
        return torch.stack(rows).view(2, 6, 7, 3).transpose(1, 2)

    for got, expected in zip(outcome(lambda *x: room(*x, *lengths), inputs), outcome(by_definition, inputs),
                             strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@GROUPS
def test_gradcheck(groups):
    inputs = [tensor.requires_grad_() for tensor in qkv(groups, tokens=4)]
    assert torch.autograd.gradcheck(Heads(Config()), inputs)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_a_named_kernel_runs_and_is_recorded(impl):
    room, inputs = Heads(Config(), impl=impl, scale=0.3), qkv(2)
    with trace(room) as records:
        output = room(*inputs)
    assert (records[0].impl, records[0].reason) == (impl, "asked for by name")
    torch.testing.assert_close(output, masked_attention(*inputs, pairs_of("causal", 6), 0.3)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("logits", [1.0, 1e4])
def test_precision_and_huge_logits(dtype, logits):
    inputs = qkv(2, dtype=dtype)
    inputs[0] *= logits
    pairs = pairs_of("causal", 6)
    exact = masked_attention(*(tensor.double() for tensor in inputs), pairs, 0.5)[0]
    plain = masked_attention(*inputs, pairs, 0.5)[0].double()
    allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (Heads(Config())(*inputs).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens):
    query, key, value = qkv(2, tokens)
    output = Heads(Config())(query, key, value)
    torch.testing.assert_close(output, value.repeat_interleave(3, 2))
    assert layer_of(2)(torch.zeros(2, tokens, 12, dtype=torch.float64)).shape == (2, tokens, 12)


def test_what_stands_in_padding_reaches_nothing():
    layer, x = layer_of(2), torch.randn(2, 7, 12, dtype=torch.float64)
    expected = layer(x, LENGTHS)
    x[0, :2] = x[0, 7:] = x[1, 5:] = torch.nan
    got = layer(x, LENGTHS)
    assert torch.equal(got[0, 2:7], expected[0, 2:7]) and torch.equal(got[1, :5], expected[1, :5])


@GROUPS
@pytest.mark.parametrize("steps", [[1] * 7, [3, 1, 3], [7]], ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("trained", [True, False])
def test_cache_is_no_cache(groups, steps, lengths, trained):
    layer, x = layer_of(groups), torch.randn(2, 7, 12, dtype=torch.float64)
    cache, parts, done = Cache(), [], 0
    assert cache.bytes() == 0
    for step in steps:
        done += step
        known = None if lengths is None else lengths.clamp(max=done)
        with torch.set_grad_enabled(trained):
            parts.append(layer(x[:, done - step:done], known, cache))
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, lengths), rtol=1e-12, atol=1e-12)
    assert cache.bytes() == 2 * 7 * layer.cache_bytes() == 2 * 7 * 2 * groups * 2 * 8


def test_a_later_token_and_another_row_change_nothing():
    layer, x = layer_of(2), torch.randn(2, 7, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    changed[1] += 1
    torch.testing.assert_close(layer(changed)[0, :4], layer(x)[0, :4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x.flip(0)).flip(0), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_every_parameter_is_trained(groups):
    layer = layer_of(groups)
    layer(torch.randn(2, 7, 12, dtype=torch.float64)).square().sum().backward()
    zero = [name for name, parameter in layer.named_parameters() if not parameter.grad.any()]
    # A bias of all keys shifts every score alike.
    assert [name for name in zero if name != "key.bias"] == []


def test_as_many_key_value_heads_as_before_change_no_bit():
    x = torch.randn(2, 7, 12)
    for groups in (6, 3, 1):
        layer = layer_of(groups).float()
        assert torch.equal(from_dense(layer, Config(num_kv_heads=groups))(x), layer(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_from_torch(bias, causal):
    layer = nn.MultiheadAttention(12, 6, bias=bias, batch_first=True, dtype=torch.float64)
    if bias:
        nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(from_dense(layer, Config(), causal=causal)(x), expected)
    fewer = from_dense(layer, Config(num_kv_heads=2), causal=causal)
    assert fewer.key.weight.shape == (4, 12) and not torch.allclose(fewer(x), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [2, 3, 7])
def test_equal_heads_are_pooled_without_rounding(shared, dtype):
    """The mean by way of the sum differs in its last bit for some numbers and 7 heads."""
    dense = SharedAttention(Config(), width=8, num_heads=2 * shared, head_dim=4, bias=True).to(dtype)
    with torch.no_grad():
        for project in (dense.key, dense.value):
            for part in (project.weight, project.bias):
                heads = part.unflatten(0, (2, shared, 4))
                heads.copy_(heads[:, :1].expand_as(heads).clone())
    pooled = from_dense(dense, Config(num_kv_heads=2))
    for name in ("key", "value"):
        got, heads = getattr(pooled, name), getattr(dense, name)
        assert torch.equal(got.weight.view(2, 4, 8), heads.weight.view(2, shared, 4, 8)[:, 0])
        assert torch.equal(got.bias.view(2, 4), heads.bias.view(2, shared, 4)[:, 0])
    x = torch.randn(2, 5, 8).to(dtype)
    torch.testing.assert_close(pooled(x), dense(x))


@pytest.mark.parametrize("before, after", [(6, 1), (6, 2), (6, 3), (4, 2), (4, 1)])
def test_pooling_is_the_mean_of_neighbours(before, after):
    """Of the projections, and so of the keys and values themselves."""
    layer = layer_of(before, num_heads=12, head_dim=2)
    pooled = from_dense(layer, Config(num_kv_heads=after))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for name in ("key", "value"):
        heads = getattr(layer, name)(x).view(2, 7, after, before // after, 2).mean(3)
        torch.testing.assert_close(getattr(pooled, name)(x).view(2, 7, after, 2), heads)
    for name in ("query", "output"):
        assert torch.equal(getattr(pooled, name).weight, getattr(layer, name).weight)
    assert not pooled.key.weight.data_ptr() == layer.key.weight.data_ptr()


def test_groups_of_four_save_three_quarters_of_the_cache():
    assert share_saved(32, 8) == 0.75 and share_saved(32, 32) == 0 and share_saved(32, 1) == 31 / 32
    assert cache_bytes(8, 128, torch.bfloat16) == 4096 == cache_bytes(32, 128, torch.bfloat16) // 4
    assert cache_bytes(8, 128, torch.float32, value_dim=64) == 8 * 192 * 4
    dense, grouped = (SharedAttention(Config(num_kv_heads=groups), width=64, num_heads=8) for groups in (8, 2))
    assert 1 - grouped.cache_bytes() / dense.cache_bytes() == share_saved(8, 2) == 0.75


@KINDS
@GROUPS
def test_the_arithmetic_is_that_of_the_permitted_pairs_and_the_bytes_are_fewer(kind, groups):
    room, inputs = Heads(Config(), causal=kind != "bidirectional"), qkv(groups)
    with trace(room) as records:
        room(*inputs, *((LENGTHS,) if kind == "padded" else ()))
    cost = records[0].cost
    assert cost.multiply_adds == cost.dense_multiply_adds == int(pairs_of(kind, 6).sum()) * 7
    assert cost.bytes == 8 * 2 * 7 * (2 * 6 * 4 + groups * 7) and cost.choosing == 0


def test_another_rule_is_refused():
    room = Heads(Config())
    room.rule = TopK(1)
    with pytest.raises(RuleError, match="heads: expected the rule Shared"):
        room(*qkv(2))


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "2", 2**31], ids=str)
def test_a_bad_number_of_heads_is_refused(number):
    with pytest.raises(RuleError, match="heads.Config: expected num_kv_heads from 1"):
        Config(num_kv_heads=number)
    with pytest.raises(FileError, match="heads.Config"):
        Config.from_json({"num_kv_heads": number})


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ShapeError, match="key/value heads that divide 6, got 4"):
        layer_of(4)
    with pytest.raises(ShapeError, match="key/value heads that divide 3, got 2"):
        from_dense(layer_of(3), Config(num_kv_heads=2))
    with pytest.raises(ShapeError, match="heads that divide the width 12"):
        SharedAttention(Config(), width=12, num_heads=5)
    with pytest.raises(ShapeError, match="G dividing H"):
        Heads(Config())(*qkv(4))


def test_a_bidirectional_layer_has_no_cache():
    with pytest.raises(ShapeError, match="a causal layer for a cache"):
        layer_of(2, causal=False)(torch.zeros(1, 1, 12, dtype=torch.float64), cache=Cache())


@pytest.mark.parametrize("settings", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.1}],
                         ids=str)
def test_a_layer_that_is_more_than_self_attention_is_refused(settings):
    with pytest.raises(ShapeError, match="plain self-attention without dropout"):
        from_dense(nn.MultiheadAttention(16, 4, **settings), Config())
