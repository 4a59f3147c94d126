"""What one pass over data tells of linear layers, and the sweep that moves their weights by it.

With G = Σ x xᵀ over the inputs x [D] of a layer, changing its weights from W to W' changes its outputs by
‖(W − W')X‖² = tr (W − W') G (W − W')ᵀ in all.
References: Optimal Brain Surgeon, Hassibi, Stork 1993; SparseGPT, Frantar, Alistarh 2023, arXiv 2301.00774.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sentei.core.errors import RuleError


class Calibration:
    """What one pass over data tells of a linear layer: sums in fp64, so that the order of the batches hardly matters.

    `gram` [D, D], Σ x xᵀ over the rows seen; `rows`, their number; `fisher` [O, D], Σ (g xᵀ)², or None without
    gradients. Rows are taken as samples: gradients that cancel between the tokens of a sequence are not seen to.
    """

    def __init__(self, width: int, outputs: int):
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.squares = torch.zeros(outputs, width, dtype=torch.float64)
        self.rows = self.rows_with_gradients = 0
        self._inverse: tuple[int, float, torch.Tensor] | None = None  # rows and damp it is of

    @property
    def fisher(self) -> torch.Tensor | None:
        """Float64 [O, D], or None before any gradient was seen."""
        return self.squares if self.rows_with_gradients else None

    def see(self, x: torch.Tensor) -> None:
        """Adds inputs [..., D]. Cost: D² multiply-adds a row, in fp64."""
        x = x.detach().flatten(0, -2).double()
        self.gram += (x.T @ x).to(self.gram.device)
        self.rows += len(x)

    def see_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds the gradients [..., O] of a loss, summed over its rows, at the outputs for x [..., D]."""
        x, gradient = (part.detach().flatten(0, -2).double() for part in (x, gradient))
        self.squares += (gradient.square().T @ x.square()).to(self.squares.device)
        self.rows_with_gradients += len(x)

    def merge(self, other: "Calibration") -> None:
        """Adds what another pass, over other data, has seen of the same layer."""
        self.gram += other.gram
        if other.rows_with_gradients:
            self.squares += other.squares
        self.rows += other.rows
        self.rows_with_gradients += other.rows_with_gradients

    def inverse(self, damp: float) -> torch.Tensor:
        """Float64 [D, D]: (G + damp · mean diagonal)⁻¹; an input that was always 0 counts as independent.

        It is kept until more is seen.
        """
        if self._inverse is None or self._inverse[:2] != (self.rows, damp):
            self._inverse = self.rows, damp, torch.cholesky_inverse(torch.linalg.cholesky(self.damped(damp)))
        return self._inverse[2]

    def damped(self, damp: float) -> torch.Tensor:
        """G with its diagonal raised.

        Raises:
            RuleError: nothing was seen, or numbers that are not finite, or too few rows for a damp of 0.
        """
        gram = self.gram.clone()
        diagonal = gram.diagonal()
        diagonal += damp * diagonal.mean()
        diagonal += (diagonal == 0).to(diagonal)
        if not self.rows or not bool(gram.isfinite().all()) or bool(torch.linalg.cholesky_ex(gram).info):
            raise RuleError("Calibration", expected="finite inputs that span the layer's width, or a damp",
                            got=f"{self.rows} rows, damp {damp}", do="calibrate on more rows, or raise the damp")
        return gram


@contextmanager
def calibrate(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Calibration]]:
    """Statistics of the inputs of `layers` for every call inside the block, and of their gradients if any flow.

        with calibrate({"down": network.down}) as seen:
            loss(model(x)).backward()          # or model(x) alone, where no saliency is fisher
        seen["down"].gram
    """
    seen = {name: Calibration(layer.in_features, layer.out_features) for name, layer in layers.items()}

    def listen(calibration: Calibration) -> Callable:
        def hook(_, inputs, output):
            calibration.see(inputs[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: calibration.see_gradient(inputs[0], gradient))
        return hook

    handles = [layer.register_forward_hook(listen(seen[name])) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sweep(weight: torch.Tensor, inverse: torch.Tensor, choose: Callable[[torch.Tensor, slice], torch.Tensor],
          width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT: column by column, what is dropped is made up for by the columns that follow.

    Args:
        weight: [O, D].
        inverse: float64 [D, D], G⁻¹.
        choose: from the saliencies w² / U_jj² [O, N] of the next `width` columns, and where they stand, to bool [O, N].
        width: columns chosen at a time. UᵀU = G⁻¹, so that U_jj² is [G⁻¹]_jj once the columns before j are settled.
    Returns:
        weight [O, D] in float64 and bool [O, D], what was kept.
    """
    weight, upper = weight.detach().double().clone(), torch.linalg.cholesky(inverse, upper=True).to(weight.device)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], width):
        columns = slice(start, min(start + width, weight.shape[1]))
        part, factor, errors = weight[:, columns], upper[columns, columns], torch.zeros_like(weight[:, columns])
        kept[:, columns] = choose(part.square() / factor.diagonal().square(), columns)
        for j in range(part.shape[1]):
            errors[:, j] = part[:, j].masked_fill(kept[:, start + j], 0) / factor[j, j]
            part[:, j:] -= errors[:, j:j + 1] * factor[j, j:]
        weight[:, columns.stop:] -= errors @ upper[columns, columns.stop:]
    return weight.masked_fill(~kept, 0), kept
