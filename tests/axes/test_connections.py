"""connections: the choice, what is always kept, compensation, and its doors."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from sentei.axes.connections import Config, Connections, SelfAttention, from_dense
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import All, Capacity, Certified, Mass, Threshold, TopK
from sentei.core.tracing import trace
from sentei.kernels.attention import attend
from sentei.kernels.attention.select import ESTIMATORS, Antidiagonal, PageBounds, Pooled, Sampled, Trailing, always_kept

SMALL = Config(rule=TopK(2), tile=(4, 2), window=0)


def qkv(batch: int = 1, queries: int = 24, keys: int = 24, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    shapes = (queries, heads, 8), (keys, groups, 8), (keys, groups, 6)
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]


def selection_of(room: Connections, *inputs):
    with trace(room) as records:
        room(*inputs)
    return records[0].selection


def softmax_over(query, key, value, pairs, scale: float) -> torch.Tensor:
    """Attention over the pairs, bool [B, H, Tq, Tk]."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~pairs, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("criterion", ["mass", "peak", "output"])
@pytest.mark.parametrize("rule", [All(), TopK(3), Mass(0.4), Threshold(0.6)], ids=str)
def test_is_softmax_over_the_tiles_selected(rule, criterion, share):
    room, inputs = Connections(replace(SMALL, rule=rule, criterion=criterion, share=share)), qkv(2)
    selection = selection_of(room, *inputs)
    assert selection.ids.shape[:3] == (2, 2 if share == "group" else 4, 6) and selection.unit == 2
    pairs = selection.mask().repeat_interleave(4 // selection.ids.shape[1], 1)
    pairs = pairs.repeat_interleave(4, 2).repeat_interleave(2, 3) & torch.ones(24, 24, dtype=torch.bool).tril()
    torch.testing.assert_close(room(*inputs), softmax_over(*inputs, pairs, 8 ** -0.5))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_a_named_kernel_runs_and_is_recorded(impl):
    room, inputs = Connections(SMALL, impl=impl), qkv()
    with trace(room) as records:
        output = room(*inputs)
    assert (records[0].impl, records[0].reason) == (impl, "asked for by name")
    torch.testing.assert_close(output, Connections(SMALL)(*inputs))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=list(ESTIMATORS))
def test_a_mass_of_1_is_dense_attention_with_any_estimator(estimator):
    inputs = qkv()
    kind = estimator(stride=2) if "stride" in estimator.__dataclass_fields__ else estimator()
    room = Connections(replace(SMALL, rule=Mass(1.0), estimator=kind))
    assert torch.equal(room(*inputs), Connections(Config(tile=(4, 2)))(*inputs))


def test_all_does_not_score_and_costs_no_choosing():
    with trace(room := Connections(Config(tile=(4, 2)))) as records:
        room(*qkv())
    assert records[0].cost.choosing == 0 and records[0].cost.density() == 1


def test_what_cannot_drop_anything_is_the_dense_kernel():
    room, inputs = Connections(replace(SMALL, window=100)), qkv()
    assert room.is_dense(*inputs)
    assert torch.equal(room(*inputs), Connections(Config(tile=(4, 2)))(*inputs))


@pytest.mark.parametrize("window", [0, 4, 6])
def test_sink_diagonal_window_and_the_last_block_are_kept(window):
    kept = selection_of(Connections(replace(SMALL, rule=TopK(0), window=window)), *qkv()).mask()[0, 0]
    for block in range(6):
        near = {tile for tile in range(12) if 4 * block - window <= 2 * tile + 1 and 2 * tile <= 4 * block + 3}
        expected = set(range(12)) if block == 5 else near | {0}
        assert set(kept[block].nonzero()[:, 0].tolist()) == expected


def test_the_sink_is_the_first_real_key():
    lengths = torch.tensor([[0, 24], [9, 24]])
    room = Connections(replace(SMALL, rule=TopK(0)))
    kept = selection_of(room, *qkv(2), lengths).mask()[:, 0, 4]
    assert kept[0].nonzero()[:, 0].tolist() == [0, 8, 9] and kept[1].nonzero()[:, 0].tolist() == [4, 8, 9]


@pytest.mark.parametrize("lengths", [None, [[0, 24], [7, 24]], [[0, 24], [3, 20]]], ids=["none", "left", "both sides"])
@pytest.mark.parametrize("rule", [TopK(2), Mass(0.3)], ids=str)
def test_compensation_is_attention_with_a_mean_key_for_every_dropped_tile(rule, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    room, inputs = Connections(replace(SMALL, rule=rule, compensate=True)), qkv(2)
    query, key, value = inputs
    selection = selection_of(room, *inputs, lengths)
    grid = room.grid(query, key, lengths)
    dropped = grid.full(query.device) & ~selection.mask()
    assert dropped.any()
    pairs = selection.mask().repeat_interleave(4, 2).repeat_interleave(2, 3)
    pairs &= torch.ones(24, 24, dtype=torch.bool).tril()
    if lengths is not None:
        positions = torch.arange(24)
        real = (positions >= lengths[:, :1]) & (positions < lengths[:, 1:])
        pairs &= real[:, None, None]
    key, value = (x.repeat_interleave(2, 2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * 8 ** -0.5
    pooled_key, pooled_value = (x.unflatten(1, (12, 2)).mean(2) for x in (key, value))
    pooled = torch.einsum("bihd,bjhd->bhij", query, pooled_key) * 8 ** -0.5 + torch.tensor(2.0).log()
    both = torch.cat([scores.masked_fill(~pairs, -torch.inf),
                      pooled.masked_fill(~dropped.repeat_interleave(4, 2), -torch.inf)], -1)
    shares = torch.nan_to_num(both.softmax(-1), nan=0.0)
    expected = torch.einsum("bhij,bjhd->bihd", shares, torch.cat([value, pooled_value], 1))
    torch.testing.assert_close(room(*inputs, lengths), expected)


def test_gradients_with_compensation_are_finite_where_a_row_sees_nothing():
    inputs = [tensor.requires_grad_() for tensor in qkv(2)]
    room = Connections(replace(SMALL, compensate=True))
    room(*inputs, torch.tensor([[0, 24], [7, 24]])).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


def test_a_dropped_value_counts_again_when_compensated():
    query, key, value = qkv()
    value.requires_grad_()
    selection = selection_of(Connections(SMALL), query, key, value)
    tile = int((~selection.mask()[0, 0, 3, :6]).nonzero()[0])
    for compensate in (False, True):
        output = Connections(replace(SMALL, compensate=compensate))(query, key, value)
        gradient, = torch.autograd.grad(output[0, 12:16, 0].sum(), value)
        assert bool(gradient[0, 2 * tile:2 * tile + 2, 0].abs().max() > 0) == compensate


def test_cross_lengths_and_bidirectional():
    inputs = qkv(queries=7, keys=24)
    room = Connections(replace(SMALL, rule=Mass(0.2)), causal=False)
    selection = selection_of(room, *inputs)
    assert selection.permitted.unique().tolist() == [12] and selection.density() < 1
    dense = Connections(Config(tile=(4, 2)), causal=False)
    everything = torch.ones(1, 4, 7, 24, dtype=torch.bool)
    torch.testing.assert_close(dense(*inputs), softmax_over(*inputs, everything, 8 ** -0.5))


def test_the_scale_reaches_the_kernel_and_the_choice():
    inputs = qkv()
    room = Connections(Config(tile=(4, 2)), scale=0.05)
    assert torch.equal(room(*inputs), attend(*inputs, room.tiles(selection_of(room, *inputs), *inputs[:2]), scale=0.05))
    flat, sharp = (selection_of(Connections(replace(SMALL, rule=Mass(0.8)), scale=scale), *inputs).density()
                   for scale in (0.0, 3.0))
    assert sharp < flat


TOKENS = Config(rule=TopK(7), tile=(1, 1), window=2, estimator=Sampled(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("changes", [{}, {"criterion": "mass"}, {"rule": TopK(2)}, {"rule": TopK(0), "window": 0},
                                     {"rule": TopK(100)}, {"window": 100}, {"estimator": Sampled(8)}], ids=str)
@pytest.mark.parametrize("lengths", [None, [[0, 24], [7, 24]], [[0, 24], [3, 20]], [[0, 24], [5, 5]]], ids=str)
def test_tokens_that_keep_tokens_need_no_selection(changes, lengths, dtype):
    room, inputs = Connections(replace(TOKENS, **changes)), [tensor.to(dtype) for tensor in qkv(2, queries=20)]
    lengths = None if lengths is None else torch.tensor(lengths)
    output = room.by_token(*inputs, lengths)
    torch.testing.assert_close(room(*inputs, lengths), output, rtol=0, atol=0)
    with trace(room) as records:
        torch.testing.assert_close(room(*inputs, lengths), output)
    assert len(records) == 1


@pytest.mark.parametrize("changes", [
    {"tile": (2, 1)}, {"tile": (1, 2)}, {"rule": TopK((1, 2, 3, 4))}, {"rule": Mass(0.5)}, {"estimator": Pooled()},
    {"criterion": "output"}, {"share": "group"}, {"compensate": True}], ids=str)
def test_every_other_choice_is_made_by_the_rule(changes):
    assert Connections(TOKENS).is_by_token
    assert not Connections(replace(TOKENS, **changes)).is_by_token
    assert not Connections(TOKENS, causal=False).is_by_token


def test_always_kept_is_what_the_room_forces():
    room, inputs = Connections(replace(SMALL, window=3)), qkv()
    assert torch.equal(room.forced(*inputs), always_kept(room.grid(*inputs[:2], None), inputs[0].device, window=3))


@pytest.mark.parametrize("settings, expected", [
    ({"rule": "all"}, "rule a Rule"), ({"estimator": "pooled"}, "estimator an Estimator"),
    ({"criterion": "loss"}, "criterion 'mass'"), ({"tile": (0, 4)}, "tile two sizes from 1"),
    ({"tile": (4,)}, "tile two sizes from 1"), ({"tile": (4.0, 4)}, "tile two sizes from 1"),
    ({"tile": (True, 4)}, "tile two sizes from 1"), ({"window": -1}, "window from 0"),
    ({"decode": "all"}, "decode All"), ({"decode": Capacity(0.5)}, "decode All"),
    ({"decode": TopK((1, 2))}, "decode All"),
    ({"share": "layer"}, "share 'head' or 'group'"),
    ({"compensate": 1}, "compensate a bool"), ({"rule": Capacity(0.5)}, "rule a Rule that looks at each query alone"),
    ({"tile": (10**30, 64)}, "tile two sizes from 1 to 4096"), ({"window": 10**30}, "window from 0"),
], ids=str)
def test_a_bad_field_is_named(settings, expected):
    with pytest.raises(RuleError, match=f"connections.Config: expected .*{expected}.*change that field"):
        Config(**settings)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_from_dense_copies_the_layer(bias, causal):
    layer = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1) if causal else None
    converted = from_dense(layer, Config(tile=(4, 2)), causal=causal)
    torch.testing.assert_close(converted(x), layer(x, x, x, attn_mask=mask, need_weights=False)[0])
    lengths = torch.tensor([[0, 10], [4, 10]])
    torch.testing.assert_close(converted(x, lengths)[1, 4:], converted(x[1:, 4:])[0])


@pytest.mark.parametrize("settings", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.1}],
                         ids=str)
def test_a_layer_that_is_more_than_self_attention_is_refused(settings):
    with pytest.raises(ShapeError, match="plain self-attention without dropout"):
        from_dense(nn.MultiheadAttention(16, 4, **settings), Config())


@pytest.mark.parametrize("settings", [{"num_heads": 3}, {"num_heads": 4, "num_kv_heads": 3}], ids=str)
def test_heads_that_do_not_divide_are_refused(settings):
    with pytest.raises(ShapeError, match="KV heads that divide the heads, heads that divide the width"):
        SelfAttention(Config(), width=16, **settings)


def test_grouped_heads_of_their_own_width():
    layer = SelfAttention(SMALL, width=16, num_heads=6, num_kv_heads=2, head_dim=8)
    assert layer(torch.randn(1, 12, 16)).shape == (1, 12, 16) and layer.key.weight.shape == (16, 16)


@pytest.mark.parametrize("estimator, share", [(Pooled(), 1 / 2), (PageBounds(), 2 / 2), (Antidiagonal(2), 1 / 2),
                                              (Sampled(1), 1), (Sampled(4), 1 / 4),
                                              (Trailing(3), 1 / 4)], ids=str)
def test_choosing_costs_what_the_estimator_says(estimator, share):
    room = Connections(replace(SMALL, rule=Threshold(0.1), estimator=estimator))
    with trace(room) as records:
        room(*qkv())
    permitted = int(records[0].selection.permitted.sum())
    rows, columns = room.config.tile
    assert records[0].cost.choosing == round(permitted * rows * columns * 8 * share)


def test_a_call_within_one_query_block_chooses_nothing_unless_a_trace_listens(monkeypatch):
    room = Connections(replace(SMALL, rule=Threshold(0.9)))
    query, key, value = qkv()
    inputs = query[:, -room.config.tile[0]:], key, value
    with trace(room) as records:
        chosen = room(*inputs)
    monkeypatch.setattr(Connections, "score", None)
    assert torch.equal(room(*inputs), chosen) and records[0].selection.density() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", [{}, {"criterion": "mass"}, {"share": "group"}, {"estimator": Pooled()},
                                      {"rule": TopK(3)}, {"rule": Mass(0.5)}, {"tile": (16, 4)}, {"tile": (4, 16)},
                                      {"window": 3}, {"compensate": True}], ids=str)
def test_without_lookahead_no_row_knows_a_later_one(settings, dtype):
    """Rows up to a cut, whatever comes after it; in the last query block of the call everything is kept."""
    config = replace(Config(rule=Threshold(0.6), tile=(16, 16), window=0), **settings)
    inputs = [tensor.to(dtype) for tensor in qkv(queries=80, keys=80)]
    differ = {config: False, config.without_lookahead(): False}
    for cut in range(33, 64):
        later = [tensor.clone() for tensor in inputs]
        for tensor in later:
            tensor[:, cut:] = torch.randn_like(tensor[:, cut:]) * 5
        for kind in differ:
            before, after = (Connections(kind)(*tensors)[:, :cut] for tensors in (inputs, later))
            differ[kind] |= not torch.equal(before, after)
    assert list(differ.values()) == [True, False]


def test_without_lookahead_as_many_rows_have_a_say_as_a_block_has():
    config = replace(SMALL, tile=(64, 32), estimator=Pooled()).without_lookahead()
    assert (config.tile, config.estimator) == ((8, 32), Trailing(7))
    assert replace(SMALL, tile=(4, 2)).without_lookahead().tile == (4, 2)
    assert config.without_lookahead() is config
    alone = replace(SMALL, tile=(1, 1))
    assert alone.without_lookahead() is alone


def test_a_choice_that_sees_the_values_of_the_diagonal_block_cannot_be_without_lookahead():
    with pytest.raises(RuleError, match="without_lookahead: expected the criterion 'peak' or 'mass', got 'output'"):
        replace(SMALL, criterion="output").without_lookahead()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("change", [
    {"rule": Threshold((0.9, 0.5, 0.2, 0.0))}, {"rule": Mass(0.6), "criterion": "mass"}, {"rule": All()},
    {"share": "group"}, {"criterion": "output"}, {"compensate": True}, {"estimator": Antidiagonal(2)},
    {"estimator": Trailing(2), "rule": Mass(0.5)}, {"estimator": PageBounds(), "window": 5}], ids=str)
@pytest.mark.parametrize("lengths", [None, [[3, 24], [0, 17]]], ids=["whole", "padded"])
def test_the_shortcut_computes_what_the_selection_says(change, dtype, lengths):
    room, inputs = Connections(replace(SMALL, **change)), [x.to(dtype) for x in qkv(2)]
    inputs = inputs if lengths is None else [*inputs, torch.tensor(lengths)]
    with trace(room):
        expected = room(*inputs)
    assert torch.equal(room(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_stands_in_padding_reaches_neither_output_nor_gradient_of_a_certified_room(dtype):
    room, lengths = Connections(replace(SMALL, rule=Certified(0.1))), torch.tensor([[3, 20], [0, 24]])
    given = [tensor.to(dtype) for tensor in qkv(2)]
    broken = [tensor.clone() for tensor in given]
    for tensor in broken[1:]:
        tensor[0, :3] = tensor[0, 20:] = torch.nan
    for traced in (False, True):
        results = []
        for tensors in (given, broken):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            with torch.no_grad():
                plain = room(*leaves, lengths)
            with trace(room) if traced else nullcontext():
                output = room(*leaves, lengths)
            results.append([plain, output, *torch.autograd.grad(output.sum(), leaves)])
        assert all(map(torch.equal, *results))


def test_a_certified_room_traces_what_its_kernel_computed():
    inputs = [8 * tensor for tensor in qkv()]
    room, dense = Connections(replace(SMALL, rule=Certified(0.3))), Connections(replace(SMALL, rule=All()))
    output = room(*inputs)
    with trace(room) as records:
        torch.testing.assert_close(room(*inputs), output)
    assert 0 < records.density() < 1
    assert (output - dense(*inputs)).abs().max() <= 2 * 0.3 * inputs[2].abs().max()
    with pytest.raises(RuleError, match="share 'head' and no compensation"):
        Connections(replace(SMALL, rule=Certified(0.3), compensate=True))
