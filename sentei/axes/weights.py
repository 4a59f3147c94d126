"""weights: a layer keeps some of its weights, whatever the input.

| query | candidate | score used to choose | value if kept | usual rule |
| the layer (never looks at x) | weight, or column (neuron) | saliency | its contribution | Capacity, then Fixed |

    y = Σ over the candidates c kept of  value_c(x)        a weight's value is w_ij x_j, a neuron's down_f · hidden_f(x)

Hard pruning. The layer is the one query, so that here `Capacity` is the share of the candidates it keeps; candidates
compete within the layer, the row of an output, or groups of four (2:4). With G = Σ x xᵀ over a calibration pass, and so
‖(W − W')X‖² as the loss, whose Hessian is 2G, the saliencies of one pass are

    magnitude |w_ij|          obd ½ · 2G_jj · w_ij²          wanda |w_ij| · √G_jj          obs w_ij² / [G⁻¹]_jj
    fisher    ½ · Σ_t (g_i x_j)² · w_ij², with g the gradients of a loss at the outputs of the rows t

and a column's is that of its weights together. obs is what removing one weight costs after the others have been
moved to make up for it; `fix` moves them. Zeros save no time: only columns do.
References: LeCun, Denker, Solla 1990 (OBD); Hassibi, Stork 1993 (OBS); SparseGPT 2301.00774; Wanda 2306.11695;
FASP 2501.09412 (columns refitted by least squares).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.axis import Axis
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.rules import All, Capacity, Fixed, Rule, TopK, rule_from_json
from sentei.core.selection import Selection
from sentei.kernels.linear.calibration import Calibration, sweep

SALIENCIES = ("magnitude", "obd", "wanda", "obs", "fisher")
AMONG = ("layer", "row", "four", "columns")
OF_EXPERTS = ("reap", "experts")  # the saliency of whole experts of a mixture, which compete among themselves
SWEPT = 128  # columns whose weights are chosen together while sweeping, as in SparseGPT


@dataclass(frozen=True, kw_only=True)
class Config:
    """How weights are chosen.

    Args:
        rule: Capacity is the share kept, TopK the number, among those that compete; Fixed names candidates; All is the
            dense layer. Saliencies are no logits, and rules of shares of a softmax have no meaning here.
        saliency: one of SALIENCIES; all but magnitude need a calibration.
        among: weights compete within the "layer", the "row" of an output, or each "four" inputs of an output (2:4 is
            TopK(2)); or whole "columns" do, the inputs of a layer or the neurons of a network. With the saliency "reap"
            the "experts" of a pretrained mixture do.
        damp: added to the diagonal of G, as a share of its mean, before it is inverted.
    """

    rule: Rule = field(default_factory=All)
    saliency: str = "magnitude"
    among: str = "columns"
    damp: float = 0.01

    def __post_init__(self):
        number = isinstance(self.damp, int | float) and not isinstance(self.damp, bool)
        counts = isinstance(self.rule, All | TopK | Capacity | Fixed) and not any(
            isinstance(getattr(self.rule, name, None), tuple) for name in ("k", "capacity"))
        of_experts = (self.saliency, self.among) == OF_EXPERTS
        checks = {"rule All, TopK, Capacity or Fixed, of one number": counts,
                  f"saliency one of {', '.join(SALIENCIES)}": of_experts or self.saliency in SALIENCIES,
                  f"among one of {', '.join(AMONG)}": of_experts or self.among in AMONG,
                  "damp from 0 to 1": number and 0 <= self.damp <= 1}
        for expected, holds in checks.items():
            if not holds:
                raise RuleError("weights.Config", expected=expected, got=repr(self), do="change that field")

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {**asdict(self), "rule": self.rule.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("weights.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        try:
            return cls(**{**value, "rule": rule_from_json(value["rule"])})
        except RuleError as error:
            raise FileError("weights.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


class Network(nn.Module):
    """A feed-forward network [..., D] → [..., D_out]: down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate.

    It holds the layers it is given, those of a model for instance.
    """

    def __init__(self, up: nn.Linear, down: nn.Linear, gate: nn.Linear | None = None,
                 activation: Callable[[torch.Tensor], torch.Tensor] = F.silu):
        super().__init__()
        self.up, self.down, self.gate, self.activation = up, down, gate, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network of x."""
        return self.down(self.neurons(x))

    def neurons(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[..., F]: the neurons of x, all or those of `ids`."""
        hidden = rows_of(self.up, ids)(x)
        return self.activation(hidden) if self.gate is None else self.activation(rows_of(self.gate, ids)(x)) * hidden


def rows_of(layer: nn.Linear, ids: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer with only the outputs `ids`; gradients reach the layer."""
    if ids is None:
        return layer
    bias = None if layer.bias is None else layer.bias[ids]
    return lambda x: F.linear(x, layer.weight[ids], bias)


class Weights(Axis):
    """A linear layer or network that keeps some of its weights or columns: x [..., D] → [..., D_out].

    Until `fix` is called the layer is whole and the rule is applied at every call, so that rules can be tried; `fix`
    makes the choice final. Gradients reach what is kept.

    Args:
        config: how to choose.
        layer: nn.Linear, or a Network, whose neurons are the candidates; neither is changed.
        saliency: float, one number a candidate, in the order of the weight [D_out, D] or of its columns.
    """

    def __init__(self, config: Config, layer: nn.Linear | Network, saliency: torch.Tensor):
        super().__init__(config.rule)
        self.config, self.layer = config, layer
        self.sizes = tuple(last_of(layer).weight.shape)
        self.register_buffer("saliency", saliency.detach().flatten()[None])
        self.register_buffer("inputs", None)
        self.fixed: Selection | None = None

    def score(self, x):
        return self.saliency

    def select(self, scores, x):
        if self.fixed is not None:
            return self.fixed
        return Selection.from_mask(self.choose(scores), ~scores.isneginf())

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [1, C]: what the rule keeps now."""
        shape = scores.shape if self.is_structured else self.sizes
        return compete(self.rule, scores.view(shape), self.config.among).reshape(scores.shape)

    def apply(self, selection, x):
        last = last_of(self.layer)
        if self.fixed is not None and self.inputs is not None:
            return self.layer(x.index_select(-1, self.inputs))
        if self.fixed is not None or selection.ids.shape[-1] == selection.num_candidates:
            return self.layer(x)
        if not self.is_structured:
            return F.linear(x, last.weight.where(selection.mask().view(self.sizes), 0), last.bias)
        ids = selection.ids[0]
        hidden = self.layer.neurons(x, ids) if isinstance(self.layer, Network) else x.index_select(-1, ids)
        return F.linear(hidden, last.weight[:, ids], last.bias)

    def account(self, selection, x):
        rows, kept = x[..., 0].numel(), int(selection.count().sum())
        outputs, inputs = self.sizes
        first = (1 if self.layer.gate is None else 2) * x.shape[-1] if isinstance(self.layer, Network) else 0
        left = kept if self.is_structured else inputs
        cost = Cost(multiply_adds=rows * left * (outputs + first),
                    dense_multiply_adds=rows * inputs * (outputs + first),
                    bytes=(x.numel() + rows * outputs + left * (outputs + first)) * x.element_size())
        return cost, "eager", ("smaller matrices: what is dropped is not computed" if self.is_structured else
                               "a dense product, zeros included: pruned weights, 2:4 or not, save no time here")

    @property
    def is_structured(self) -> bool:
        """Whether candidates are columns, without which the matrices are smaller."""
        return self.config.among == "columns"

    @torch.no_grad()
    def fix(self, calibration: Calibration | None = None) -> "Weights":
        """Makes the choice final, in place, as the rule Fixed; `layer` is then a plain, pruned module of its own.

        Args:
            calibration: of the layer's inputs (a network's: of `down`); with it what is kept is moved to make up for
                what is not: columns by least squares, weights in a sweep of OBS over the columns (SparseGPT). The
                sweep of the saliency obs also chooses anew as it goes, from weights that have been moved.
        Cost: a factorisation of D³ and a sweep of D_out · D² multiply-adds in fp64.
        """
        last, kept = last_of(self.layer), self.choose(self.saliency)
        weight = last.weight
        if not bool(kept.all()) and not self.is_structured:
            if calibration is None:
                weight = weight.where(kept.view(self.sizes), 0)
            else:
                weight, kept = self.swept(weight, kept.view(self.sizes), calibration)
        ids = kept.flatten().nonzero()[:, 0]
        if self.is_structured:
            weight = self.refitted(weight, ids, calibration)
            if len(ids) < self.sizes[1] and isinstance(self.layer, nn.Linear):
                self.inputs = ids
        self.layer = self.replaced(weight, ids)
        self.rule, kept = Fixed(tuple(ids.tolist())), kept.reshape(1, -1)
        self.fixed = Selection.from_mask(kept, torch.ones_like(kept))
        return self

    def swept(self, weight: torch.Tensor, kept: torch.Tensor, calibration: Calibration
              ) -> tuple[torch.Tensor, torch.Tensor]:
        """The moved weights and what is kept of them."""
        among = self.config.among
        if self.config.saliency != "obs" or isinstance(self.rule, Fixed):
            return sweep(weight, calibration.inverse(self.config.damp), lambda _, columns: kept[:, columns], SWEPT)
        # A share can be met a few columns at a time; a number can only be met over all of them.
        width = 4 if among == "four" else SWEPT if isinstance(self.rule, Capacity) else self.sizes[1]
        return sweep(weight, calibration.inverse(self.config.damp),
                     lambda saliency, _: compete(self.rule, saliency, among), width)

    def refitted(self, weight: torch.Tensor, ids: torch.Tensor, calibration: Calibration | None) -> torch.Tensor:
        """The columns `ids`, by least squares W G_·S (G_SS)⁻¹ if there is a calibration."""
        if calibration is None or len(ids) in (0, self.sizes[1]):
            return weight[:, ids]
        kept = torch.zeros(self.sizes[1], dtype=torch.bool, device=weight.device).index_fill(0, ids, True)
        gone = (~kept).nonzero()[:, 0]
        if self.config.saliency == "obs" and len(gone) < len(ids):  # the same from the inverse, which obs has made
            inverse, weight = calibration.inverse(self.config.damp).to(weight.device)[gone], weight.double()
            return weight[:, ids] - torch.linalg.solve(inverse[:, gone], weight[:, gone].T).T @ inverse[:, ids]
        gram = calibration.damped(self.config.damp).to(weight.device)
        return torch.linalg.solve(gram[ids][:, ids], gram[ids] @ weight.double().T).T

    def replaced(self, weight: torch.Tensor, ids: torch.Tensor) -> nn.Linear | Network:
        """The layer with other weights in the last matrix, and only the neurons `ids` before it."""
        layer = self.layer
        last = linear_like(last_of(layer), weight, last_of(layer).bias)
        if isinstance(layer, nn.Linear):
            return last
        up, gate = (None if part is None else linear_like(part, part.weight[ids], part.bias, ids)
                    for part in (layer.up, layer.gate))
        return Network(up, last, gate, layer.activation)


def last_of(layer: nn.Linear | Network) -> nn.Linear:
    """The matrix whose weights or columns are the candidates."""
    return layer.down if isinstance(layer, Network) else layer


def linear_like(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None = None
                ) -> nn.Linear:
    """A layer of its own with this weight and bias, or rows `ids` of the bias, in the dtype and place of `layer`."""
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None,
                              device=layer.weight.device, dtype=layer.weight.dtype)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias if ids is None else bias[ids])
    return made


def compete(rule: Rule, saliency: torch.Tensor, among: str) -> torch.Tensor:
    """Bool [O, N]: what the rule keeps of saliency [O, N], among those that compete."""
    shape = {"layer": (1, -1), "columns": (1, -1), "row": saliency.shape, "four": (-1, 4)}[among]
    laid = saliency.reshape((1, -1) if isinstance(rule, Fixed) else shape)
    kept = rule(laid.T).mask().T if isinstance(rule, Capacity) else rule(laid).mask()
    return kept.reshape(saliency.shape)


def saliency_of(layer: nn.Linear | Network, config: Config, calibration: Calibration | None) -> torch.Tensor:
    """Float64 [D_out, D], or [D] of columns, see the head of this file.

    Raises:
        RuleError: a saliency that needs a calibration, or gradients, without them.
        ShapeError: a calibration of another layer.
    """
    weight = last_of(layer).weight.detach().double()
    kind = config.saliency
    has = calibration is not None and (calibration.rows_with_gradients if kind == "fisher" else calibration.rows)
    if kind != "magnitude" and not has:
        raise RuleError("weights", expected=f"a calibration{' with gradients' if kind == 'fisher' else ''} for {kind}",
                        got="none", do="run the model inside `calibrate`")
    if calibration is not None and tuple(calibration.squares.shape) != tuple(weight.shape):
        raise ShapeError("weights", expected=f"a calibration of {list(weight.shape)}",
                         got=str(list(calibration.squares.shape)), do="calibrate the layer that is pruned")
    losses = weight.square()
    if kind in ("obd", "wanda"):
        losses = losses * calibration.gram.diagonal().to(weight.device)
    elif kind == "fisher":
        losses = losses * calibration.fisher.to(weight.device) / 2
    elif kind == "obs":
        losses = losses / calibration.inverse(config.damp).diagonal().to(weight.device)
    if config.among == "columns":
        losses = losses.sum(0)
        if kind == "magnitude" and isinstance(layer, Network):
            for part in (layer.up, layer.gate):
                losses = losses if part is None else losses * part.weight.detach().double().square().sum(1)
    return losses.sqrt() if kind in ("magnitude", "wanda") else losses


def from_dense(layer: nn.Linear | Network, config: Config, calibration: Calibration | None = None) -> Weights:
    """The layer with only some of its weights or columns; with the rule All it computes the same, bit for bit.

    Args:
        layer: is left as it is; until `fix` the room shares its parameters.
        calibration: of the layer's inputs, of a network's `down`; for every saliency but magnitude.
    Raises:
        RuleError, ShapeError: see `saliency_of`; weights of a network, which are those of its layers; or inputs that
            are no multiple of four where fours compete.
    """
    if config.among not in AMONG:
        raise ShapeError("weights", expected=f"among one of {', '.join(AMONG)} for a layer", got=repr(config.among),
                         do="drop the experts of a pretrained mixture with sentei.convert")
    if isinstance(layer, Network) and config.among != "columns":
        raise ShapeError("weights", expected="among 'columns' for a network", got=repr(config.among),
                         do="prune the weights of its linear layers one by one")
    if config.among == "four" and layer.in_features % 4:
        raise ShapeError("weights", expected="inputs in fours", got=f"{layer.in_features}", do="choose among rows")
    return Weights(config, layer, saliency_of(layer, config, calibration))
