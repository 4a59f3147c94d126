"""Key/value heads of a group merged into one, by least squares on what a calibration pass has seen.

Rotary embedding turns number j of a head together with number j + D/2: a complex number k_f times a phase. A complex
factor commutes with the phase, so that with one shared key z = Σ_g u_g k_g and a factor c of each query head

    score of head h = Re Σ_f q_hf · conj(k_gf) ≈ Re Σ_f q_hf · conj(c_hf) · conj(z_f)      q'_hf = conj(c_hf) · q_hf

whatever the positions. It is linear in the products φ_hfg = q_hf · conj(k_gf), so their second moment says how far any
choice of u and c is off. Values are not turned: the shared value is any map M of the group's values side by side, and
each query head reads it through an output of its own,

    output of head h = O_h y_h,own ≈ O'_h M y_h        y_h = Σ_t a_ht [v_1t … v_mt], what head h attends to in each.

Both are found by alternating least squares from the best rank-one and rank-D approximations, and lie in the span of
what was there: a group of one, or of equal heads, is kept as it is.
References: the mean of a group, Ainslie et al. 2023, arXiv 2305.13245; joint low rank of O·V, e.g. MHA2MLA 2502.14837.
"""

from typing import NamedTuple

import torch

KEY_STEPS, VALUE_STEPS, CONJUGATE_STEPS = 8, 2, 40
# Added to the diagonal of a moment, as a share of its mean: what was never seen stays finite.
DAMP = 1e-6


class Keys(NamedTuple):
    """What makes the shared key and the queries that go with it, complex128.

    Args:
        shared: [F, m]; the key is Σ_g shared[f, g] · k_gf.
        factors: [H, F]; the conjugate multiplies the query.
        error: Σ (score − merged score)² ÷ Σ score², as weighed in the moment.
    """

    shared: torch.Tensor
    factors: torch.Tensor
    error: float


class Values(NamedTuple):
    """What makes the shared value and the outputs that go with it, float64.

    Args:
        shared: [D, m · D], M.
        outputs: [H, O, D].
        error: Σ ‖output − merged output‖² ÷ Σ ‖output‖², heads taken one by one.
    """

    shared: torch.Tensor
    outputs: torch.Tensor
    error: float


def merge_keys(moment: torch.Tensor, own: list[int]) -> Keys:
    """The best shared key of m heads for H query heads.

    Args:
        moment: float64 [H, 2 F m, 2 F m], of the products φ in the order [frequency, key head, real or imaginary].
        own: for each query head its key head, 0 to m - 1.
    Cost: KEY_STEPS · H · (2 F m)³ multiply-adds.
    """
    heads, group = len(moment), max(own) + 1
    frequencies = moment.shape[-1] // (2 * group)
    moment, exact = _damped(moment), _exact(own, frequencies, group).to(moment)
    target = (moment @ exact[..., None])[..., 0]
    shared = _best_rank_one(moment, own, frequencies, group)
    for _ in range(KEY_STEPS):
        factors = _factors(moment, target, shared)
        shared = _shared(moment, target, factors, group)
    factors = _factors(moment, target, shared)
    missing = torch.view_as_real(factors[:, :, None] * shared).reshape(heads, -1) - exact
    error = torch.einsum("hi,hij,hj->", missing, moment, missing) / (exact * target).sum()
    return Keys(shared, factors, float(error))


def chosen_key(moment: torch.Tensor, own: list[int]) -> int:
    """The key head of a group that serves all its queries best as it is, where a norm lets no factor through."""
    heads, group = len(moment), max(own) + 1
    frequencies = moment.shape[-1] // (2 * group)
    exact = _exact(own, frequencies, group).to(moment)
    missing = [_exact([kept] * heads, frequencies, group).to(moment) - exact for kept in range(group)]
    return min(range(group), key=lambda kept: float(torch.einsum("hi,hij,hj->", missing[kept], moment, missing[kept])))


def _exact(own: list[int], frequencies: int, group: int) -> torch.Tensor:
    """[H, 2 F m]: the coefficients of φ that give every head its own score."""
    exact = torch.zeros(len(own), frequencies, group, 2)
    exact[range(len(own)), :, own, 0] = 1
    return exact.reshape(len(own), -1)


def _damped(moment: torch.Tensor) -> torch.Tensor:
    """With its diagonals raised, so that it can be inverted."""
    moment = moment.double()
    raised = DAMP * moment.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    return moment + raised[:, None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)


def _best_rank_one(moment: torch.Tensor, own: list[int], frequencies: int, group: int) -> torch.Tensor:
    """[F, m]: of every frequency by itself the first singular vector of its keys, each as large as its queries."""
    blocks = moment.unflatten(1, (frequencies, group, 2)).unflatten(4, (frequencies, group, 2))
    blocks = blocks.diagonal(dim1=1, dim2=4).sum(0)  # [m, 2, m, 2, F], of all heads together
    gram = torch.complex(blocks[:, 0, :, 0] + blocks[:, 1, :, 1], blocks[:, 1, :, 0] - blocks[:, 0, :, 1])
    size = torch.tensor([own.count(g) for g in range(group)], dtype=moment.dtype, device=moment.device).sqrt()
    _, vectors = torch.linalg.eigh(gram.permute(2, 0, 1) * size[:, None] * size)
    return vectors[..., -1] * size


def _times(numbers: torch.Tensor) -> torch.Tensor:
    """[…, 2, 2]: complex numbers as the real matrices that multiply by them."""
    real, imaginary = numbers.real, numbers.imag
    return torch.stack([torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)], -2)


def _factors(moment: torch.Tensor, target: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[H, F]: the best factors for a shared key."""
    frequencies, group = shared.shape
    basis = moment.new_zeros(frequencies, group, 2, frequencies, 2)
    every = torch.arange(frequencies)
    basis[every, :, :, every] = _times(shared)
    basis = basis.flatten(3).flatten(0, 2)
    found = torch.linalg.solve(basis.T @ moment @ basis, (target @ basis)[..., None])
    return torch.view_as_complex(found.reshape(len(moment), frequencies, 2))


def _shared(moment: torch.Tensor, target: torch.Tensor, factors: torch.Tensor, group: int) -> torch.Tensor:
    """[F, m]: the best shared key for the factors of every head, at length 1 in every frequency."""
    frequencies = factors.shape[1]
    left = moment.new_zeros(moment.shape[1:])
    right = target.new_zeros(target.shape[1])
    for head, turn in enumerate(_times(factors)):  # [F, 2, 2]
        turned = torch.einsum("fab,fgaxhc->fgbxhc", turn, moment[head].reshape(
            frequencies, group, 2, frequencies, group, 2))
        left += torch.einsum("fgbxhc,xcd->fgbxhd", turned, turn).reshape(left.shape)
        right += torch.einsum("fab,fga->fgb", turn, target[head].reshape(frequencies, group, 2)).flatten()
    found = torch.linalg.solve(_damped(left[None])[0], right).reshape(frequencies, group, 2)
    shared = torch.view_as_complex(found)
    return shared / shared.abs().square().sum(1, keepdim=True).sqrt()


def merge_values(moment: torch.Tensor, outputs: torch.Tensor, own: list[int]) -> Values:
    """The best shared value of m heads for H query heads.

    Args:
        moment: float64 [H, m D, m D], of what each query head attends to in the values of the group side by side.
        outputs: [H, O, D], what each query head's output is multiplied by.
        own: for each query head its value head, 0 to m - 1.
    Cost: about VALUE_STEPS · CONJUGATE_STEPS · H · (m D)² · D multiply-adds.
    """
    moment, outputs = _damped(moment), outputs.double()
    size = outputs.shape[2]
    exact = outputs.new_zeros(*outputs.shape[:2], moment.shape[1])
    for head, value in enumerate(own):
        exact[head, :, value * size:(value + 1) * size] = outputs[head]
    shared = _best_rank(exact, moment.mean(0), size)
    for _ in range(VALUE_STEPS):
        shared = _shared_value(moment, exact, _outputs(moment, exact, shared), shared)
    found = _outputs(moment, exact, shared)
    missing = exact - found @ shared
    error = ((missing @ moment) * missing).sum() / ((exact @ moment) * exact).sum()
    return Values(shared, found, float(error))


def _best_rank(exact: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """[rank, m D]: the joint singular value decomposition of all outputs, for one moment of the values."""
    sizes, vectors = torch.linalg.eigh(moment)
    sizes = sizes.clamp(min=1e-9 * float(sizes[-1])).sqrt()
    stacked = exact.flatten(0, 1) @ (vectors * sizes)
    _, first = torch.linalg.eigh(stacked.T @ stacked)
    return first[:, -rank:].T @ (vectors / sizes).T


def _outputs(moment: torch.Tensor, exact: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[H, O, D]: the best outputs for a shared value."""
    seen = shared @ moment
    return torch.linalg.solve(seen @ shared.T, seen @ exact.mT).mT


def _shared_value(moment: torch.Tensor, exact: torch.Tensor, outputs: torch.Tensor, start: torch.Tensor
                  ) -> torch.Tensor:
    """[D, m D]: the shared value for given outputs, Σ_h O'ᵀO' M P = Σ_h O'ᵀ O P, by conjugate gradients."""
    gram = outputs.mT @ outputs
    shared, rest = start, (outputs.mT @ exact @ moment).sum(0) - (gram @ start @ moment).sum(0)
    direction, size = rest, rest.square().sum()
    for _ in range(CONJUGATE_STEPS):
        if size <= 1e-24 * shared.square().sum():
            break
        image = (gram @ direction @ moment).sum(0)
        step = size / (direction * image).sum()
        shared, rest = shared + step * direction, rest - step * image
        before, size = size, rest.square().sum()
        direction = rest + size / before * direction
    return shared
