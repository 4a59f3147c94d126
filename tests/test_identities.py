"""One loop, many rooms: `core.definition.apply` against textbook formulas written here in plain torch, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from sentei.core.definition import apply
from sentei.core.rules import All, Capacity, Fixed, Mass, Rule, Threshold, TopK
from sentei.core.selection import Selection
from sentei.kernels.routing import route

T, D, E, HIDDEN = 7, 6, 5, 8
PER_QUERY = [All(), TopK(1), TopK(3), Mass(0.6), Threshold(0.3)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def causal_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled dot products [..., T, T], -inf where the key comes later."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


def attend(rule: Rule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention as a room of the loop: a token keeps earlier tokens, and their values are rows."""
    scores = causal_scores(query, key)
    return apply(rule(scores).weigh_softmax(scores), value)


def feed_forwards() -> list:
    """E small networks from [..., D] to [..., D]."""
    up, down = random(E, HIDDEN, D, seed=10), random(E, D, HIDDEN, seed=11)
    return [lambda x, e=e: F.silu(x @ up[e].T) @ down[e].T for e in range(E)]


# connections: a token keeps earlier tokens


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=["one head", "batch", "batch and heads"])
def test_attention_that_keeps_all_is_softmax_attention(lead):
    query, key, value = (random(*lead, T, D, seed=seed) for seed in range(3))
    same(attend(All(), query, key, value), F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_attention_top_k_is_softmax_over_the_k_largest():
    query, key, value = (random(T, D, seed=seed) for seed in range(3))
    expected = []
    for i in range(T):
        scores = (key[: i + 1] @ query[i]) / D**0.5
        best = scores.topk(min(3, i + 1))
        expected.append(best.values.softmax(0) @ value[best.indices])
    same(attend(TopK(3), query, key, value), torch.stack(expected))


@pytest.mark.parametrize("k", [T, T + 5])
def test_top_k_of_everything_is_keep_all(k):
    query, key, value = (random(T, D, seed=seed) for seed in range(3))
    assert torch.equal(attend(TopK(k), query, key, value), attend(All(), query, key, value))


# experts: a token keeps networks


@pytest.mark.parametrize("rule", PER_QUERY, ids=str)
def test_attention_is_a_mixture_of_constant_experts(rule):
    query, key, value = (random(T, D, seed=seed) for seed in range(3))
    scores = causal_scores(query, key)
    selection = rule(scores).weigh_softmax(scores)
    expected = torch.where(rule(scores).mask(), scores, -torch.inf).softmax(-1) @ value
    same(apply(selection, [lambda x, row=row: row for row in value], query), expected)
    same(apply(selection, value), expected)
    same(route(query, selection.ids, selection.weights, [lambda x, row=row: row.expand(len(x), -1) for row in value]),
         expected)


def test_a_mixture_of_experts_is_top_2_with_renormalised_weights():
    x, router, experts = random(T, D), random(E, D, seed=1), feed_forwards()
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        probabilities = (router @ x[t]).softmax(0)
        best = probabilities.topk(2)
        for weight, e in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            expected[t] += weight * experts[e](x[t])
    scores = x @ router.T
    selection = TopK(2)(scores).weigh_softmax(scores)
    same(apply(selection, experts, x), expected)
    same(route(x, selection.ids, selection.weights, experts), expected)


def test_choosing_by_a_bias_and_weighing_without_it_are_two_numbers():
    """Balancing without a loss: the bias moves the choice and never the weight (DeepSeek-V3)."""
    x, router, bias, experts = random(T, D), random(E, D, seed=1), random(E, seed=2), feed_forwards()
    affinity = (x @ router.T).sigmoid()
    chosen = (affinity + bias).topk(2, dim=-1).indices
    weights = affinity.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = sum(weights[:, s, None] * torch.stack([experts[e](x[t]) for t, e in enumerate(chosen[:, s].tolist())])
                   for s in range(2))
    selection = TopK(2)(affinity + bias)
    total = (affinity * selection.mask()).sum(-1, keepdim=True)
    same(apply(selection.weigh(affinity / total), experts, x), expected)


def test_expert_choice_is_the_flipped_view():
    scores = random(8, 4)
    selection = Capacity(0.25)(scores)
    assert torch.equal(selection.flip().mask(), TopK(2)(scores.T.contiguous()).mask())


# heads: a query head keeps key/value heads


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["one group = MQA", "GQA", "a group a head = MHA"])
def test_grouped_heads_are_attention_with_repeated_keys_and_values(groups):
    heads = 4
    query, key, value = random(heads, T, D), random(groups, T, D, seed=1), random(groups, T, D, seed=2)
    repeated = (x.repeat_interleave(heads // groups, dim=0) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, is_causal=True)
    if groups == 1:
        same(F.scaled_dot_product_attention(query, key[0], value[0], is_causal=True), expected)
    of_group = torch.arange(heads) // (heads // groups)
    keep = of_group[:, None] == torch.arange(groups)
    values = [lambda x, g=g: attend(All(), x.view(T, D), key[g], value[g]).flatten() for g in range(groups)]
    y = apply(Selection.from_mask(keep, torch.ones_like(keep)), values, query.flatten(1))
    same(y.view(heads, T, D), expected)


# rank: a token keeps rank-one directions


def test_lora_that_keeps_all_is_the_product_of_its_factors():
    x, a, b = random(T, D), random(4, D, seed=1), random(HIDDEN, 4, seed=2)
    projected = x @ a.T
    same(apply(All()(projected).weigh(projected), b.T.contiguous()), x @ (b @ a).T)


def test_lora_top_k_keeps_the_directions_that_contribute_most():
    x, a, b = random(T, D), random(4, D, seed=1), random(HIDDEN, 4, seed=2)
    expected = torch.zeros(T, HIDDEN, dtype=torch.float64)
    for t in range(T):
        parts = [b[:, r] * (a[r] @ x[t]) for r in range(4)]
        expected[t] = sum(sorted(parts, key=lambda part: -part.norm())[:2])
    projected = x @ a.T
    selection = TopK(2)(projected.abs() * b.norm(dim=0)).weigh(projected)
    same(apply(selection, b.T.contiguous()), expected)


# depth: a token keeps, or skips, the block


@pytest.mark.parametrize("rule", [Capacity(1.0), All()], ids=str)
def test_depth_at_full_capacity_is_the_plain_residual_block(rule):
    x, block = random(T, D), feed_forwards()[0]
    same(x + apply(rule(random(T, 1, seed=1)), [block], x), x + block(x))


def test_depth_at_part_capacity_is_mixture_of_depths():
    x, gate, block = random(8, D), random(D, seed=1), feed_forwards()[0]
    scores = x @ gate
    expected = x.clone()
    for t in scores.topk(3).indices.tolist():
        expected[t] = x[t] + scores[t] * block(x[t])
    selection = Capacity(3 / 8)(scores[:, None]).weigh(scores[:, None])
    same(x + apply(selection, [block], x), expected)


# weights: a layer keeps neurons, whatever the input


def test_fixed_is_the_layer_with_rows_physically_removed():
    up, down, x = random(HIDDEN, D), random(D, HIDDEN, seed=1), random(T, D, seed=2)
    kept = (0, 3, 4, 7)
    smaller = torch.nn.Linear(D, 4, bias=False, dtype=torch.float64)
    narrower = torch.nn.Linear(4, D, bias=False, dtype=torch.float64)
    with torch.no_grad():
        smaller.weight.copy_(up[list(kept)])
        narrower.weight.copy_(down[:, list(kept)])
        expected = narrower(smaller(x).relu())
    neurons = [lambda x, f=f: (up[f] @ x).relu() * down[:, f] for f in range(HIDDEN)]
    same(apply(Fixed(kept)(torch.zeros(T, HIDDEN)), neurons, x), expected)


def test_pruning_by_saliency_is_a_layer_that_keeps_its_weights():
    """The layer is one query and each weight a candidate; the dearest share by w²·h survives (OBD)."""
    weight, curvature, x = random(D), random(D, seed=1).square(), random(D, seed=2)
    saliency = weight.square() * curvature
    expected = sum(weight[i] * x[i] for i in saliency.argsort(descending=True)[:2])
    y = apply(TopK(2)(saliency[None]), (weight * x)[:, None])
    same(y, expected.view(1, 1))


# channels: an image keeps feature maps


@pytest.mark.parametrize("k", [4, 2], ids=["soft", "top 2"])
def test_channel_gates_are_squeeze_and_excitation(k):
    images, kernel = random(2, 4, 5, 5), random(3, 4, 3, 3, seed=1)
    squeeze, excite = random(2, 4, seed=2), random(4, 2, seed=3)
    gates = ((images.mean((2, 3)) @ squeeze.T).relu() @ excite.T).sigmoid()
    weakest_kept = gates.topk(k, dim=-1).values[:, -1:]
    gated = images * torch.where(gates >= weakest_kept, gates, 0.0)[:, :, None, None]
    expected = F.conv2d(gated, kernel)
    contributions = torch.stack([F.conv2d(images[:, c:c + 1], kernel[:, c:c + 1]).flatten(1) for c in range(4)], dim=1)
    selection = TopK(k)(gates[:, None]).weigh(gates[:, None])
    same(apply(selection, contributions).view(expected.shape), expected)


# what holds in every room


@pytest.mark.parametrize("rule", PER_QUERY, ids=str)
def test_fixed_of_what_a_rule_chose_reproduces_the_rule(rule):
    scores, values = random(1, 6), random(6, D, seed=1)
    chosen = rule(scores)
    again = Fixed(tuple(chosen.ids[0].tolist()))(random(1, 6, seed=2))
    assert torch.equal(again.ids, chosen.ids)
    assert torch.equal(apply(again.weigh_softmax(scores), values), apply(chosen.weigh_softmax(scores), values))


@pytest.mark.parametrize("rule", [*PER_QUERY, Capacity(0.5)], ids=str)
def test_permuting_the_candidates_permutes_ids_and_nothing_else(rule):
    scores, values = random(T, 6), random(6, D, seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    plain, moved = rule(scores), rule(scores[:, order])
    assert torch.equal(moved.mask(), plain.mask()[:, order])
    assert torch.equal(moved.permitted, plain.permitted)
    same(apply(moved.weigh_softmax(scores[:, order]), values[order]), apply(plain.weigh_softmax(scores), values))


@pytest.mark.parametrize("rule", [*PER_QUERY, Capacity(0.5), Fixed((0, 2))], ids=str)
def test_the_slot_in_the_batch_does_not_matter(rule):
    scores, values = random(3, T, 6), random(3, 6, D, seed=1)
    y = apply(rule(scores).weigh_softmax(scores), values)
    for slot in range(3):
        alone = apply(rule(scores[slot]).weigh_softmax(scores[slot]), values[slot])
        assert torch.equal(y[slot], alone)


@pytest.mark.parametrize("rule", [*PER_QUERY, Capacity(0.5), TopK(0)], ids=str)
def test_routing_is_the_same_loop_over_the_candidates(rule):
    x, scores, experts = random(T, D), random(T, E, seed=1), feed_forwards()
    selection = rule(scores).weigh_softmax(scores)
    same(route(x, selection.ids, selection.weights, experts), apply(selection, experts, x))
