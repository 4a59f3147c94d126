"""experts, token by token: later ones, padding, batch slots, caches, precision and odd inputs."""

import pytest
import torch
from mixtures import KINDS, LOOKING, UNIT, WIDTH, E, answer, layer, x_of

from sentei.axes.experts import Config, Experts, MixtureOfExperts
from sentei.axes.experts.gates import Renormalised, Sigmoid, Softmax, Unit
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import Capacity, TopK
from sentei.core.tracing import trace
from sentei.kernels import gains, native

every_kind = pytest.mark.parametrize("kind", KINDS)
any_kind = pytest.mark.parametrize("kind", [*KINDS, *LOOKING])


# later tokens, padding, batch slots, caches


def looks_ahead(made: MixtureOfExperts) -> bool:
    """Whether an answer up to a cut differs when what comes after it does."""
    x = x_of(2, 16)
    changed = False
    for cut in range(1, 16):
        later = x.clone()
        later[:, cut:] = 5 * torch.randn_like(later[:, cut:])
        before, after = (answer(made, tokens)[:, :cut] for tokens in (x, later))
        changed |= not torch.allclose(before, after, rtol=1e-12, atol=1e-12)
    return changed


@every_kind
def test_no_token_knows_a_later_one(kind):
    assert not looks_ahead(layer(kind))


@every_kind
def test_no_token_knows_a_later_one_in_training(kind):
    if kind != "noisy":  # the noise of two calls differs
        assert not looks_ahead(layer(kind).train())


@pytest.mark.parametrize("kind", LOOKING)
def test_a_router_that_looks_ahead_is_caught_and_refused_where_causal(kind):
    assert looks_ahead(layer(kind))
    config = LOOKING[kind]
    assert not config.is_causal
    with pytest.raises(RuleError, match="looks at no later token, got .*; choose by TopK, or a capacity with"):
        MixtureOfExperts(config, width=WIDTH, neurons=E * UNIT)
    with pytest.raises(RuleError, match="looks at no later token"):
        config.without_lookahead()
    assert KINDS["top-2"].without_lookahead() is KINDS["top-2"]


def test_a_rule_that_looks_ahead_is_refused_when_it_comes_later():
    made = layer("switch")
    made.experts.rule = Capacity(0.5)
    with pytest.raises(RuleError, match="looks at no later token"):
        made(x_of(4))


@any_kind
def test_padding_changes_nothing_and_gets_nothing(kind):
    made, x = layer(kind), x_of(3, 9)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate(((0, 9), (2, 7), (4, 4))):
        mask[row, start:stop] = True
    y = answer(made, x, mask)
    garbage = torch.where(mask.unsqueeze(-1), x, 1e6)
    torch.testing.assert_close(answer(made, garbage, mask)[mask], y[mask], rtol=0, atol=0)
    tasks = torch.tensor([1]) if kind == "task" else None
    torch.testing.assert_close(made(x[1:2, 2:7], None, tasks)[0], y[1, 2:7])
    if made.shared is None:
        assert (y[~mask] == 0).all()


@any_kind
def test_the_slot_in_the_batch_does_not_matter(kind):
    made, x = layer(kind), x_of(3, 8)
    y = answer(made, x)
    for slot in range(3):
        tasks = torch.tensor([slot]) if kind == "task" else None
        torch.testing.assert_close(made(x[slot:slot + 1], None, tasks)[0], y[slot], rtol=1e-13, atol=1e-13)


@every_kind
def test_tokens_one_at_a_time_are_the_tokens_at_once(kind):
    made, x = layer(kind), x_of(1, 8)
    alone, y = torch.cat([answer(made, x[:, t:t + 1]) for t in range(8)], 1), answer(made, x)
    torch.testing.assert_close(alone, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(answer(made, x[:, :5]), y[:, :5], rtol=1e-13, atol=1e-13)
    assert KINDS[kind].is_causal


# precision and odd inputs


@any_kind
def test_routing_is_in_fp32_also_under_autocast(kind, monkeypatch):
    monkeypatch.setattr(gains, "gain", lambda *_: (0.5, "measured here"))
    made, x = layer(kind, dtype=torch.float32), x_of(2, 16, dtype=torch.float32)
    tasks = torch.tensor([0, 1]) if kind == "task" else None
    plain = made.router(x, tasks)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), trace(made) as narrow:
        assert torch.equal(made.router(x, tasks)[0], plain) and plain.dtype == torch.float32
        y = answer(made, x)
    with trace(made) as wide:
        expected = answer(made, x)
    assert torch.equal(narrow[0].selection.ids, wide[0].selection.ids)
    assert torch.equal(narrow[0].selection.weights, wide[0].selection.weights)
    assert native.missing() or narrow[0].impl == "fused_cpp" and "torch.float32 under autocast" in narrow[0].reason
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    half = made.bfloat16()
    assert half.router(x.bfloat16(), tasks)[0].dtype == torch.float32
    assert answer(half, x.bfloat16()).dtype == torch.bfloat16


@any_kind
def test_tokens_of_another_dtype_than_the_experts_are_refused_in_four_parts(kind):
    with pytest.raises(ShapeError, match="route: expected experts of the tokens' dtype, .*got torch.float32 on cpu for "
                       "torch.bfloat16 on cpu; convert the tokens or the experts"):
        answer(layer(kind).bfloat16(), x_of(3, 4, dtype=torch.float32))


@any_kind
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (0, 3), (2, 1), (2, 3, 4)], ids=str)
def test_no_token_one_token_and_more_dimensions(kind, shape):
    made = layer(kind)
    tasks = torch.zeros(shape[:-1], dtype=torch.int64) if kind == "task" else None
    assert made(x_of(*shape), None, tasks).shape == (*shape, WIDTH)


@any_kind
def test_huge_logits_are_finite_and_nan_is_refused(kind):
    made, x = layer(kind), x_of(2, 5)
    with torch.no_grad():
        made.router.weight *= 1e6
    x.requires_grad_()
    y = answer(made, x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    with torch.no_grad():
        made.router.weight[0] = torch.nan
    with pytest.raises(RuleError, match="NaN or .inf"):
        answer(made, x)


def test_ties_go_to_the_lower_number():
    made = layer("top-2")
    with torch.no_grad():
        made.router.weight[:] = 1
    with trace(made) as records:
        made(x_of(4))
    assert records[0].selection.ids.tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("gate", [Unit(), Softmax(), Renormalised(), Sigmoid()], ids=str)
def test_minus_infinity_forbids_and_a_token_with_nothing_gets_0_and_no_nan(gate):
    room = Experts(Config(rule=TopK(2), gate=gate, unit=UNIT), 4)
    logits = torch.tensor([[-torch.inf] * 4, [1.0, -torch.inf, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf, 0.0]],
                          requires_grad=True)
    up, down = torch.randn(4, UNIT, WIDTH, requires_grad=True), torch.randn(4, WIDTH, UNIT)
    with trace(room) as records:
        y = room(x_of(3, dtype=torch.float32), logits, up, down)
    assert [sorted(set(ids) - {-1}) for ids in records[0].selection.ids.tolist()] == [[], [0], [0, 1]]
    y.sum().backward()
    assert (y[0] == 0).all() and up.grad.isfinite().all()
    assert logits.grad is None or logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", [*KINDS, "expert choice"])
def test_bfloat16_is_as_good_as_the_plain_sum_in_bfloat16(kind):
    """Error against fp64 at most twice that of the experts called one by one on the same choice, in bfloat16."""
    made, x = layer(kind), x_of(2, 32)
    with trace(made) as records:
        exact = answer(made, x)
    narrow, narrow_x = layer(kind).to(torch.bfloat16), x.bfloat16()
    room, stack = made.experts, narrow.experts.stack(made.up.bfloat16(), made.down.bfloat16())
    weights = records[0].selection.dense_weights()
    plain = sum(weights[..., e:e + 1].bfloat16() * stack[e](narrow_x) for e in range(E))
    got = room.apply(records[0].selection, narrow_x, weights, made.up.bfloat16(), made.down.bfloat16())
    if made.shared is not None:
        exact = exact - made.shared(x)
    errors = [(y.double() - exact).abs().mean() for y in (got, plain)]
    assert errors[0] <= 2 * errors[1] and got.dtype == torch.bfloat16
