"""depth: what is skipped, what is computed, padding, conversion and costs."""

import copy

import pytest
import torch
from depth_rooms import LEFT, PADDED, B, D, T, by_hand, hidden, real, room, selection_of
from torch import nn
from torch.nn import functional as F

from sentei.axes.depth import Cache, Config, Rows, Transformer, from_dense, start_as_dense
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import All, Capacity, Fixed, TopK
from sentei.core.tracing import trace

# Keep-all is the plain residual block


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("rule", [All(), Capacity(1.0), TopK(1), Fixed((0,))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_keep_all_is_the_plain_residual_block_bit_for_bit(rule, train, dtype):
    depth, x = start_as_dense(room(rule, train=train)).to(dtype), hidden().to(dtype)
    positions = torch.arange(T).expand(B, T)
    assert torch.equal(depth(x), x + depth.block(x, Rows(positions=positions)))


def test_an_untrained_predictor_keeps_everything():
    depth, x = start_as_dense(room()), hidden()
    nn.init.zeros_(depth.predictor.weight)
    assert torch.equal(depth(x), x + depth.block(x, Rows(positions=torch.arange(T).expand(B, T))))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_from_dense_copies_the_layer(bias, activation):
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, activation=activation, bias=bias, batch_first=True,
                                       norm_first=True, layer_norm_eps=0.1, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    expected = layer(x, src_mask=torch.ones(10, 10, dtype=torch.bool).triu(1))
    torch.testing.assert_close(from_dense(layer, Config())(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("settings", [{"norm_first": False}, {"dropout": 0.1}, {"batch_first": False}], ids=str)
def test_a_layer_that_is_not_a_residual_block_is_refused(settings):
    settings = {"dropout": 0.0, "batch_first": True, "norm_first": True, **settings}
    with pytest.raises(ShapeError, match="pre-norm layer, batch first and without dropout"):
        from_dense(nn.TransformerEncoderLayer(16, 4, 24, **settings), Config())


# What is computed


def test_the_block_is_given_the_rows_kept_and_no_more():
    depth = room(network=True, train=True)
    depth(hidden())
    assert [shape for shape, _ in depth.block.given] == [(B, 7, D)]


def test_where_nothing_is_kept_the_block_is_not_called():
    for depth in (room(Fixed(()), network=True), room(TopK(0), network=True, train=True),
                  room(network=True, threshold=1)):
        x = hidden().requires_grad_()
        assert torch.equal(depth(x), x) and not depth.block.given
        assert torch.equal(torch.autograd.grad(depth(x).sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("threshold, density", [(0, 1), (1, 0)])
def test_the_ends_of_the_threshold(threshold, density):
    assert selection_of(room(threshold=threshold), hidden()).density() == density


def test_a_higher_threshold_keeps_no_more():
    depths, x = [room(threshold=threshold) for threshold in (0.1, 0.5, 0.9)], hidden()
    for depth in depths:
        depth.load_state_dict(depths[0].state_dict())
    masks = [selection_of(depth, x).mask() for depth in depths]
    assert not (masks[1] & ~masks[0]).any() and not (masks[2] & ~masks[1]).any() and masks[0].sum() > masks[2].sum()


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lengths", [None, PADDED], ids=["whole", "padded"])
def test_gradients_are_those_of_finite_differences(train, lengths):
    depth, x = room(train=train), hidden()
    names = [name for name, _ in depth.named_parameters() if not name.startswith("predictor")]

    def call(x, *parameters):
        return torch.func.functional_call(depth, dict(zip(names, parameters, strict=True)), (x, lengths))

    parameters = [depth.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters), fast_mode=True)


def test_what_stands_in_the_padding_reaches_no_output_and_no_gradient():
    for train in (True, False):
        depth, x, padding = room(train=train), hidden(), ~real(PADDED)
        poisoned = x.masked_fill(padding[..., None], torch.nan).requires_grad_()
        output = depth(poisoned, PADDED)
        torch.testing.assert_close(output[~padding], depth(x, PADDED)[~padding], rtol=0, atol=0)
        (output[~padding].sum() + depth.predictor_loss(poisoned, PADDED)).backward()
        assert all(parameter.grad.isfinite().all() for parameter in depth.parameters())
        assert poisoned.grad.isfinite().all()


def test_strided_inputs_give_the_same():
    depth, x = room(), hidden()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(depth(strided), depth(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D), (1, 1, D), (2, 1, D)], ids=str)
def test_empty_inputs_and_one_token(shape, train):
    for rule in (All(), Capacity(0.4), Capacity(0)):
        depth, x = room(rule, train=train), torch.randn(*shape, dtype=torch.float64)
        output = depth(x)
        assert output.shape == x.shape
        torch.testing.assert_close(output, by_hand(depth, x, selection_of(depth, x).mask()[..., 0]))
        assert depth.predictor_loss(x).isfinite()


def test_equal_scores_keep_the_earliest_tokens():
    depth = start_as_dense(room(train=True))
    assert selection_of(depth, hidden()).mask()[0, :, 0].nonzero()[:, 0].tolist() == list(range(7))


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_huge_scores_are_scores_and_nan_or_infinity_is_refused(train):
    depth, x = room(train=train), hidden()
    assert depth(x * 1e150).isfinite().all()
    for wrong in (torch.nan, torch.inf):
        broken = x.clone()
        broken[1, 3] = wrong
        with pytest.raises(RuleError, match="finite scores.*NaN or"):
            depth(broken)
    nn.init.constant_(depth.predictor.bias, torch.nan)
    if not train:
        with pytest.raises(RuleError, match="depth: expected finite scores"):
            depth(x)


@pytest.mark.parametrize("rule", [All(), Capacity(0.4)], ids=str)
def test_bfloat16_is_as_near_as_plain_torch(rule):
    exact, x = room(rule), hidden().bfloat16().double()
    narrow = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({name: part.double() for name, part in narrow.state_dict().items()})
    kept = selection_of(narrow, x.bfloat16()).mask()[..., 0]
    expected = by_hand(exact, x, kept)
    ours, plain = (y.double() - expected for y in (narrow(x.bfloat16()), by_hand(narrow, x.bfloat16(), kept)))
    assert 0 < ours.square().mean() ** 0.5 <= 2 * plain.square().mean() ** 0.5


def test_positions_do_not_matter_without_rotary_and_do_with_it():
    x = torch.randn(1, 4, D, dtype=torch.float64)
    for rotary in (None, 50.0):
        block = Transformer(width=D, num_heads=2, hidden=12, rotary=rotary).double()
        near, far = (block(x, Rows(positions=torch.tensor([places]))) for places in ([0, 1, 2, 3], [0, 5, 6, 20]))
        later = block(x, Rows(positions=torch.tensor([[7, 12, 13, 27]])))
        assert torch.allclose(near, far) == (rotary is None)
        torch.testing.assert_close(far, later, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [{"width": 8, "num_heads": 3}, {"width": 6, "num_heads": 2, "rotary": 10.0}], ids=str)
def test_heads_that_do_not_divide_are_refused(sizes):
    with pytest.raises(ShapeError, match="heads that divide the width"):
        Transformer(hidden=4, **sizes)


@pytest.mark.parametrize("x, lengths", [((T, D), None), ((B, T, D + 1), None), ((B, T, D), (B,)), ((B, T, D), (2, 2))],
                         ids=str)
def test_shapes_are_checked(x, lengths):
    lengths = None if lengths is None else torch.zeros(*lengths, dtype=torch.int64)
    with pytest.raises(ShapeError, match="depth: expected"):
        room()(torch.randn(*x, dtype=torch.float64), lengths)


# Costs


def test_the_cost_counts_rows_and_pairs():
    depth, cache, x = room(), Cache(), hidden()
    linear, prompt = 4 * D * D + 2 * D * 12, LEFT.clamp(max=9)
    with trace(depth) as records:
        depth(x[:, :9], prompt, cache)
        depth(x[:, 9:], (LEFT - 9).clamp(min=0), cache)
    first, second = (record.selection.mask()[..., 0].sum(1).tolist() for record in records)
    assert len(set(first)) > 1, "ragged: all slots are padded to the longest"
    tokens = (prompt[:, 1] - prompt[:, 0]).tolist(), ((LEFT - 9).clamp(min=0) @ torch.tensor([-1, 1])).tolist()

    def work(rows, before):
        return sum(n * linear + 2 * D * sum(m + i + 1 for i in range(n)) for n, m in zip(rows, before, strict=True))

    costs = [record.cost for record in records]
    padded = [max(first)] * B, [max(second)] * B
    assert [cost.multiply_adds for cost in costs] == [work(padded[0], [0] * B), work(padded[1], first)]
    assert [cost.dense_multiply_adds for cost in costs] == [work(tokens[0], [0] * B), work(tokens[1], tokens[0])]
    assert costs[0].choosing == 2 * D * sum(tokens[0])


def test_a_blocks_linear_layers_are_counted_where_nothing_is_said_and_the_trace_says_who_chose():
    depth = room(network=True, train=True)
    with trace(depth) as records:
        depth(hidden())
        depth.eval()(hidden())
        depth.rule = All()
        depth(hidden())
    assert records[0].cost.multiply_adds == B * 7 * 2 * D * 12 and records[0].cost.choosing == B * T * D
    assert [record.reason for record in records] == [
        "along the sequence, later tokens included", "by the predictor, from the token alone", "each token alone"]


@pytest.mark.parametrize("settings, expected", [
    ({"rule": "all"}, "rule a Rule"), ({"rule": Capacity((0.5, 0.5))}, "of one number if Capacity"),
    ({"threshold": 1.5}, "threshold from 0 to 1"), ({"threshold": True}, "threshold from 0 to 1"),
    ({"threshold": "0.5"}, "threshold from 0 to 1"), ({"threshold": float("nan")}, "threshold from 0 to 1")], ids=str)
def test_a_bad_field_is_named(settings, expected):
    with pytest.raises(RuleError, match=f"depth.Config: expected .*{expected}.*change that field"):
        Config(**settings)


def test_the_network_of_the_block_is_what_the_docstring_says():
    block, x = Transformer(width=D, num_heads=2, hidden=12).double(), torch.randn(1, 5, D, dtype=torch.float64)
    query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2)
                         for part in block.projections(block.before_attention(x)).chunk(3, -1))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    attended = block.output(attended.flatten(2))
    expected = attended + block.down(F.gelu(block.up(block.before_network(x + attended))))
    torch.testing.assert_close(block(x, Rows(positions=torch.arange(5)[None])), expected, rtol=1e-12, atol=1e-12)
