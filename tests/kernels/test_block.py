"""Decoder layers in one native call: to the bit what the smaller calls give, and what is left alone."""

import pytest
import torch
from kernels.test_rows import heads_case, layer, random, to
from layer_steps import decoder_layer, in_steps

from sentei.core.errors import RuleError
from sentei.core.rules import All, Mass, Threshold, TopK
from sentei.kernels import block, native
from sentei.kernels.block import After, Before, Buffers, PageChoice
from sentei.kernels.paging import PAGE, bounds_of

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
HALF, WIDE = torch.bfloat16, torch.float32
RULE = Threshold(0.1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def norm_of(width: int, dtype: torch.dtype, seed: int) -> block.Norm:
    return block.Norm(random(width, seed=seed).to(dtype), 1e-5, 0.25)


def buffers_of(batch: int, groups: int, length: int, widths: tuple[int, int], dtype: torch.dtype) -> Buffers:
    """A cache of `length` tokens, NaN where nothing stands yet; the bounds of whole pages are wider
    than their keys, so that who makes them again is found out."""
    room = length // PAGE * PAGE + 2 * PAGE
    keys, values = (torch.full((batch, groups, room, width), torch.nan, dtype=dtype) for width in widths)
    for seed, states in enumerate((keys, values)):
        states[:, :, :length] = random(batch, groups, length, states.shape[3], seed=20 + seed).to(dtype)
    bounds = torch.full((batch, groups, room // PAGE, 2, widths[0]), 7.0, dtype=dtype)
    bounds[:, :, :length // PAGE] = bounds_of(keys[:, :, :length]) + torch.tensor([[-1.0], [1.0]], dtype=dtype)
    return Buffers(keys, values, bounds, length)


def case(dtype=WIDE, kept=None, length=53, rule=RULE, window=0, lengths=None, activation="silu", **heads) -> tuple:
    """The arguments of `block`."""
    x, query, key, value, turn = heads_case(dtype, **heads)
    hidden, head, width = 53, turn.cosine.shape[-1], x.shape[-1]
    groups, count = len(key[0]) // head, len(query[0]) // head
    value_head, bias = len(value[0]) // groups, query[1] is not None
    joint, gate, up, down = to(dtype, layer(width, count * value_head, 4, bias), layer(hidden, width, 1, bias),
                               layer(hidden, width, 2, False), layer(width, hidden, 3, bias))
    return (x, Before(norm_of(width, dtype, 11), query, key, value, turn),
            buffers_of(len(x), groups, length, (head, value_head), kept or dtype),
            PageChoice(rule, window, head ** -0.5, None if lengths is None else torch.tensor(lengths)),
            After(joint, norm_of(width, dtype, 12), gate, up, down, activation))


CASES = [{}, {"bias": True, "normed": True, "activation": "gelu_tanh"}, {"tokens": (2, 4), "turns": (1, 4)},
         {"heads": (9, 3), "widths": (64, 64), "inputs": 130, "tokens": (1, 1), "rule": TopK(4), "length": 1000},
         {"tokens": (1, 8), "length": 60, "rule": Mass(0.6), "window": 20}, {"tokens": (4, 1), "length": 0},
         {"tokens": (1, 3), "length": 63, "rule": All()}, {"tokens": (2, 2), "length": 15},
         {"tokens": (2, 2), "length": 90, "lengths": [[0, 92], [37, 92]], "rule": TopK(2)},
         {"heads": (4, 2), "widths": (4, 40), "tokens": (1, 5), "length": 12}, {"window": 1 << 64}]


@pytest.mark.parametrize("kept", [WIDE, HALF], ids=str)
@pytest.mark.parametrize("dtype", [WIDE, HALF], ids=str)
@pytest.mark.parametrize("given", CASES, ids=str)
def test_a_layer_is_the_smaller_calls_one_after_another(given, dtype, kept, machine):
    x, before, buffers, *others = case(dtype, kept, **given)
    expected, grown = in_steps(x, before, buffers, *others)
    copy = x.clone()
    assert torch.equal(decoder_layer(x, before, buffers, *others), expected) and torch.equal(x, copy)
    for part, own in zip(buffers[:3], grown[:3], strict=True):
        torch.testing.assert_close(part, own, rtol=0, atol=0, equal_nan=True)


def test_a_key_that_is_none_is_a_bound_that_is_none():
    """Of a page that becomes whole, in one channel; a row that cannot see it is not concerned."""
    x, before, buffers, choice, after = case(length=60, tokens=(1, 4), lengths=[[56, 64]])
    buffers.keys[0, 0, 50, 3] = torch.nan
    assert decoder_layer(x, before, buffers, choice, after).isfinite().all()
    found = buffers.bounds[0, 0, 3]
    assert found[:, 3].isnan().all() and found.isnan().sum() == 2


def test_a_number_that_is_none_among_the_scores_is_told():
    x, *others = case()
    with pytest.raises(RuleError, match="NaN or infinity"):
        decoder_layer(torch.full_like(x, torch.nan), *others)


def test_what_the_call_does_not_take_is_left():
    x, before, buffers, choice, after = given = case(tokens=(1, 2))
    assert decoder_layer(*given) is not None
    wrong = [(other, *given[1:]) for other in (
        x.double(), x.to(HALF), x[0], x[:, :0], x.repeat(9, 1, 1), x.repeat(2, 1, 1), x[..., :36].contiguous(),
        x.repeat(1, 1, 2)[..., ::2])]
    short = before.norm._replace(weight=before.norm.weight[:36])
    query = before.query[0]
    wrong += [(x, before._replace(**part), buffers, choice, after) for part in (
        {"norm": short}, {"query": (query[:20], None)}, {"query": (query.to(HALF), None)}, {"key": before.value},
        {"turn": before.turn._replace(cosine=before.turn.cosine[:, :1])})]
    full = buffers._replace(length=buffers.keys.shape[2] - 1)
    wrong += [(x, before, other, choice, after) for other in (
        full, buffers._replace(length=-1), buffers._replace(keys=buffers.keys[:, :, :-PAGE]),
        buffers._replace(keys=buffers.values),
        buffers._replace(values=buffers.values[..., :-1]), buffers._replace(bounds=buffers.bounds[:, :, :-1]),
        buffers._replace(bounds=buffers.bounds.to(HALF)), buffers._replace(keys=buffers.keys[0]),
        Buffers(*(part.double() for part in buffers[:3]), buffers.length))]
    wrong += [(x, before, buffers, other, after) for other in (choice._replace(window=-1), choice._replace(
        rule=Threshold((0.1, 0.2, 0.3))), choice._replace(lengths=torch.zeros(2, 2, dtype=torch.int64)),
        choice._replace(lengths=torch.zeros(1, 2)))]
    weight, up = after.layer[0], after.up[0]
    wrong.append((x, before._replace(query=(query[:0], None)), buffers, choice, after._replace(
        layer=(weight[:, :0], None))))
    wrong += [(x, before, buffers, choice, after._replace(**part)) for part in (
        {"norm": short}, {"layer": (weight[:36], None)}, {"layer": (weight[:, :-1].contiguous(), None)},
        {"layer": (weight, weight[:36, 0].contiguous())}, {"layer": (weight[0], None)}, {"gate": after.down},
        {"up": (up[:-1], None)}, {"down": (after.down[0][:36], None)}, {"layer": (weight.t().contiguous().t(), None)},
        {"layer": (None, None)}, {"norm": short._replace(weight=None)}, {"activation": "relu"})]
    three, *others = case(heads=(3, 2), tokens=(1, 1))
    wrong += [(three, *others)]
    odd = Buffers(buffers.keys[:, :, :-3].contiguous(), buffers.values[:, :, :-3].contiguous(),
                  buffers.bounds[:, :, :-1].contiguous(), buffers.length)
    wrong += [(x, before, odd, choice, after), (x, before, odd._replace(keys=odd.keys[0]), choice, after)]
    for arguments in wrong:
        assert decoder_layer(*arguments) is None
    with torch.enable_grad():
        assert decoder_layer(*given) is None


def test_the_structs_are_those_of_the_library():
    assert native.load().sentei_block_weights_size() == block._WEIGHTS.size
    assert native.load().sentei_block_call_size() == block._CALL.size
