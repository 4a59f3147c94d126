"""Key/value heads merged by least squares: against scores and outputs computed one by one, and a general optimiser."""

from functools import partial

import pytest
import torch

from sentei.conversion.merging import chosen_key, merge_keys, merge_values

HEADS, GROUP, FREQUENCIES, OUTPUTS = 4, 2, 3, 5
OWN = [0, 0, 1, 1]


def random(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


complex_random = partial(random, dtype=torch.complex128)


def products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """φ [H, pairs, 2 F m] of queries [H, pairs, F] and keys [m, pairs, F]."""
    found = queries[:, :, :, None] * keys.permute(1, 2, 0).conj()
    return torch.view_as_real(found).flatten(2)


def score(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The real part of Σ_f q_f conj(k_f)."""
    return (queries * keys.conj()).real.sum(-1)


def key_loss(queries, keys, shared, factors) -> torch.Tensor:
    """Σ (score − merged score)² ÷ Σ score², head by head and pair by pair."""
    merged = torch.einsum("fg,gpf->pf", shared, keys)
    exact = [score(queries[head], keys[own]) for head, own in enumerate(OWN)]
    found = [score(queries[head] * factors[head].conj(), merged) for head in range(HEADS)]
    return sum((a - b).square().sum() for a, b in zip(exact, found, strict=True)) / sum(
        a.square().sum() for a in exact)


def value_loss(seen, outputs, shared, mine) -> torch.Tensor:
    """Σ ‖O y − O' M y‖² ÷ Σ ‖O y‖² for what each head sees, [H, rows, m D]."""
    size = outputs.shape[2]
    exact = [seen[h][:, own * size:(own + 1) * size] @ outputs[h].T for h, own in enumerate(OWN)]
    found = [seen[h] @ shared.T @ mine[h].T for h in range(HEADS)]
    return sum((a - b).square().sum() for a, b in zip(exact, found, strict=True)) / sum(
        a.square().sum() for a in exact)


def least(loss, starts) -> float:
    """The smallest loss that L-BFGS finds from several starts."""
    best = float("inf")
    for start in starts:
        leaves = [part.clone().requires_grad_() for part in start]
        optimiser = torch.optim.LBFGS(leaves, max_iter=300, line_search_fn="strong_wolfe")

        def closure(leaves=leaves, optimiser=optimiser):
            optimiser.zero_grad()
            value = loss(*leaves)
            value.backward()
            return value

        optimiser.step(closure)
        best = min(best, float(loss(*leaves).detach()))
    return best


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and keys that share some of what they hold."""
    keys = complex_random(GROUP, 200, FREQUENCIES)
    keys[1] += (1 - 0.5j) * keys[0]
    return complex_random(HEADS, 200, FREQUENCIES, seed=1) * random(HEADS, 1, FREQUENCIES, seed=2), keys


def test_keys_lose_what_the_moment_says_and_no_optimiser_finds_less(pairs):
    phi = products(*pairs)
    found = merge_keys(phi.mT @ phi, OWN)
    loss = partial(key_loss, *pairs)
    assert float(loss(found.shared, found.factors)) == pytest.approx(found.error, rel=1e-3)
    starts = [(complex_random(FREQUENCIES, GROUP, seed=i), complex_random(HEADS, FREQUENCIES, seed=i + 9))
              for i in range(2)]
    assert found.error <= 1.02 * least(loss, starts)
    mean = (torch.full((FREQUENCIES, GROUP), 0.5, dtype=torch.complex128),
            torch.ones(HEADS, FREQUENCIES, dtype=torch.complex128))
    assert found.error < 0.7 * float(loss(*mean))


def test_keys_that_are_multiples_of_one_another_lose_nothing(pairs):
    queries, keys = pairs[0], torch.stack([pairs[1][0], pairs[1][0] * complex_random(FREQUENCIES, seed=5)])
    phi = products(queries, keys)
    found = merge_keys(phi.mT @ phi, OWN)
    assert found.error < 1e-5 and float(key_loss(queries, keys, found.shared, found.factors)) < 1e-9


def test_a_group_of_one_key_is_kept(pairs):
    phi = products(pairs[0], pairs[1][:1])
    found = merge_keys(phi.mT @ phi, [0] * HEADS)
    torch.testing.assert_close(found.factors * found.shared[:, 0], torch.ones(HEADS, FREQUENCIES).to(found.factors))


def test_where_keys_cannot_be_mixed_the_one_is_chosen_that_loses_least(pairs):
    phi = products(*pairs)
    ones = torch.ones(HEADS, FREQUENCIES, dtype=torch.complex128)
    losses = [float(key_loss(*pairs, torch.eye(GROUP, dtype=torch.complex128)[g].expand(FREQUENCIES, -1), ones))
              for g in range(GROUP)]
    assert chosen_key(phi.mT @ phi, OWN) == losses.index(min(losses))
    weak = products(pairs[0] * torch.tensor([0.01, 0.01, 1, 1])[:, None, None], pairs[1])
    assert chosen_key(weak.mT @ weak, OWN) == 1
    weak = products(pairs[0] * torch.tensor([1, 1, 0.01, 0.01])[:, None, None], pairs[1])
    assert chosen_key(weak.mT @ weak, OWN) == 0


def test_values_lose_what_the_moment_says_and_no_optimiser_finds_less():
    size = 3
    seen, outputs = random(HEADS, 100, GROUP * size) * random(HEADS, 1, GROUP * size, seed=3), random(
        HEADS, OUTPUTS, size, seed=4)
    found = merge_values(seen.mT @ seen, outputs, OWN)
    loss = partial(value_loss, seen, outputs)
    assert float(loss(found.shared, found.outputs)) == pytest.approx(found.error, rel=1e-3)
    starts = [(random(size, GROUP * size, seed=i), random(HEADS, OUTPUTS, size, seed=i + 9)) for i in range(2)]
    assert found.error <= 1.02 * least(loss, starts)
    mean = torch.eye(size, dtype=torch.float64).repeat(1, GROUP) / GROUP, outputs
    assert found.error < 0.7 * float(loss(*mean))


def test_values_that_are_maps_of_one_another_lose_nothing():
    first = random(HEADS, 100, 3)
    seen = torch.cat([first, first @ random(3, 3, seed=6)], 2)
    assert merge_values(seen.mT @ seen, random(HEADS, OUTPUTS, 3, seed=4), OWN).error < 1e-5
    single = merge_values(first.mT @ first, random(HEADS, OUTPUTS, 3, seed=4), [0] * HEADS)
    torch.testing.assert_close(single.outputs @ single.shared, random(HEADS, OUTPUTS, 3, seed=4))
