"""Do experts do different things? Principal angles and linear CKA, against experts that were shuffled or drawn.

A number alone says nothing: the rows of two wide experts span the whole space whatever they learned, and two random
subspaces of ranks r and s in D dimensions overlap by r·s ÷ D. So subspaces are those that hold most of the energy, and
`compare` sets every measure beside two null models: the same neurons dealt to experts at random, which asks whether
the grouping matters, and random directions of the same lengths, which asks whether the weights do.
References: Björck and Golub 1973 (principal angles); Kornblith et al. 2019, arXiv 1905.00414 (CKA).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sentei.core.errors import RuleError
from sentei.core.shapes import check_shape


def subspace(rows: torch.Tensor, *, energy: float = 0.9) -> torch.Tensor:
    """The fewest orthonormal directions [R, D] that hold the share `energy` of the rows' squared lengths.

    Args:
        rows: [N, D], any float dtype; computed in fp64. They are not centred.
        energy: above 0 and at most 1; 1 keeps every direction that is not rounding.
    Raises:
        RuleError: another energy, or rows that are not finite.
    """
    check_shape("subspace", "rows", rows, "N D")
    if not 0 < energy <= 1 or not rows.isfinite().all():
        raise RuleError("subspace", expected="finite rows and an energy above 0 and at most 1",
                        got=f"energy {energy!r}", do="choose another energy")
    _, sizes, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    held = sizes.square().cumsum(0)
    real = sizes > sizes[:1] * max(rows.shape) * torch.finfo(rows.dtype).eps
    rank = int(real.sum()) if energy == 1 else int((held < energy * held[-1:]).sum()) + 1
    return directions[:min(rank, int(real.sum()))]


def principal_angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The angles [min(R, S)] between two subspaces, in radians and ascending.

    Args:
        a, b: orthonormal directions [R, D] and [S, D], as `subspace` gives them.
    """
    sizes = check_shape("principal_angles", "a", a, "R D")
    check_shape("principal_angles", "b", b, "S D", D=sizes["D"])
    return torch.linalg.svdvals(a @ b.T).clamp(max=1).arccos()


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean squared cosine of the principal angles: 1 where one subspace holds the other, 0 where orthogonal.

    Random subspaces have max(R, S) ÷ D.
    """
    angles = principal_angles(a, b)
    return float(angles.cos().square().mean()) if len(angles) else 0.0


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of two answers to the same N inputs, from 0 to 1; blind to rotation and size.

    Args:
        x, y: [N, P] and [N, Q], one row an input; computed in fp64. A constant answer gives 0.
    """
    sizes = check_shape("linear_cka", "x", x, "N P")
    check_shape("linear_cka", "y", y, "N Q", N=sizes["N"])
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    size = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / size) if size > 0 else 0.0


def overlaps(neurons: torch.Tensor, *, energy: float = 0.9) -> torch.Tensor:
    """The overlap [E, E] of the energy subspaces of experts' neurons [E, F, P]."""
    spaces = [subspace(rows, energy=energy) for rows in neurons]
    return torch.tensor([[overlap(a, b) for b in spaces] for a in spaces], dtype=torch.float64)


def alignments(answers: torch.Tensor) -> torch.Tensor:
    """The linear CKA [E, E] of experts' answers [E, N, P] to the same inputs."""
    return torch.tensor([[linear_cka(a, b) for b in answers] for a in answers], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A similarity of experts beside what chance gives.

    Args:
        observed: [E, E].
        shuffled: the mean over pairs of different experts, one a draw, with neurons dealt to experts at random.
        random: the same with each neuron a random direction of its own length.
    """

    observed: torch.Tensor
    shuffled: torch.Tensor
    random: torch.Tensor

    @property
    def mean(self) -> float:
        """Of `observed`, over pairs of different experts."""
        return _mean_of_pairs(self.observed)

    def chance(self, null: str) -> float:
        """How often a draw of the null "shuffled" or "random" is as far from that null's middle as what was observed.

        Never below 1 ÷ (draws + 1), the least that so many draws can tell.
        """
        draws = {"shuffled": self.shuffled, "random": self.random}[null]
        middle = draws.median()
        as_far = ((draws - middle).abs() >= abs(self.mean - middle)).sum()
        return (1 + int(as_far)) / (1 + len(draws))


def compare(neurons: torch.Tensor, measure: Callable[[torch.Tensor], torch.Tensor], *, draws: int = 20,
            seed: int = 0) -> Comparison:
    """Measures experts, shuffled experts and random experts.

    Args:
        neurons: [E, F, P]; what makes up a neuron in one row, e.g. its rows of the gate and of the first projection
            and its column of the last.
        measure: from neurons to similarities [E, E]: `overlaps`, or `alignments` of answers computed from them.
        draws: of each null model.
        seed: of the draws.
    Cost: 1 + 2 · draws measurements.
    """
    sizes = check_shape("compare", "neurons", neurons, "E F P")
    if sizes["E"] < 2 or draws < 1:
        raise RuleError("compare", expected="two experts or more and a draw or more", got=f"{sizes['E']}, {draws}",
                        do="compare the experts of a whole layer")
    generator = torch.Generator().manual_seed(seed)
    shuffled, random = [], []
    for _ in range(draws):
        order = torch.randperm(sizes["E"] * sizes["F"], generator=generator).to(neurons.device)
        shuffled.append(_mean_of_pairs(measure(neurons.flatten(0, 1)[order].view_as(neurons))))
        drawn = torch.randn(neurons.shape, generator=generator, dtype=torch.float64)
        drawn = drawn.to(neurons.device, neurons.dtype)
        drawn = drawn * (neurons.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))
        random.append(_mean_of_pairs(measure(drawn)))
    return Comparison(observed=measure(neurons), shuffled=torch.tensor(shuffled), random=torch.tensor(random))


def _mean_of_pairs(similar: torch.Tensor) -> float:
    number = len(similar)
    return float((similar.sum() - similar.trace()) / (number * (number - 1)))
