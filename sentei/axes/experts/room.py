"""experts: tokens keep groups of a feed-forward network's neurons.

| query | candidate | score used to choose | value if kept | usual rule |
| token | expert: `unit` neurons, 1 or 16 or an FFN | x·router row, or a bias beside it | expert(x) | TopK, Capacity |

    y_t = Σ over the experts e kept by t of  w_te · expert_e(x_t),      expert_e(x) = down_e (act(gate_e x) · up_e x)

The neurons of a feed-forward network can be split in any groups: the sum over all of them, each weighed 1 (`Unit`),
is the dense layer. What chooses and what weighs is the gate's (`gates.py`), how many the rule's.
Nothing is dropped but by a gate's capacity, in training. The router computes in fp32 or wider, under autocast too.
The rule Capacity (expert choice) and the gate `Soft` look at later tokens: a causal layer refuses them. With the gate
`Choice` a capacity is kept by thresholds, which look at one token alone.
References: Shazeer et al. 2017, 1701.06538; Switch 2101.03961; DeepSeekMoE 2401.06066 (small experts, shared ones);
DeepSeek-V3 2412.19437; X-MoE 2204.09179 (cosine); see the gates for the others.
"""

import math
from dataclasses import dataclass, field

import torch

from sentei.axes.axis import Axis
from sentei.axes.experts import soft
from sentei.axes.experts.balance import Choices, Gauge, Sums
from sentei.axes.experts.gates import Gate, Soft, Unit, gate_from_json
from sentei.axes.experts.router import METRICS
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.modes import is_plain_call
from sentei.core.precision import in_full, widened
from sentei.core.rules import MAX_K, All, Capacity, Rule, rule_from_json
from sentei.core.selection import Selection
from sentei.core.shapes import check_shape
from sentei.kernels.routing import Stack, choose_impl, route


@dataclass(frozen=True, kw_only=True)
class Config:
    """How experts are made and chosen.

    Args:
        rule: which experts a token keeps. All with the gate Unit is the dense layer.
        gate: what the router's logits mean; Unit, Softmax, Renormalised, Noisy, Sigmoid, Task, Choice or
            Soft.
        metric: the logit of an expert for a token: "dot" x·w; "cosine", the cosine times a learned scale; "l2",
            x·w - |w|² / 2, whose order is that of the nearest w.
        unit: neurons an expert has; the whole FFN, or a part down to one neuron.
        shared: experts of `unit` neurons that every token keeps, outside the choice, each weighed 1.
    """

    rule: Rule = field(default_factory=All)
    gate: Gate = field(default_factory=Unit)
    metric: str = "dot"
    unit: int = 64
    shared: int = 0

    def __post_init__(self):
        whole = all(type(size) is int and 0 <= size <= MAX_K for size in (self.unit, self.shared))
        kinds = isinstance(self.rule, Rule) and isinstance(self.gate, Gate)
        checks = {
            "rule a Rule, gate a Gate": kinds,
            "a gate that fits the rule (weights of one kept expert that vary, scores its shares are of)":
                kinds and self.gate.fits(self.rule),
            f"metric {', '.join(map(repr, METRICS))}": self.metric in METRICS,
            "unit from 1, shared from 0": whole and self.unit > 0,
        }
        for expected, holds in checks.items():
            if not holds:
                raise RuleError("experts.Config", expected=expected, got=repr(self), do="change that field")

    @property
    def is_causal(self) -> bool:
        """Whether no token's choice or answer depends on what later tokens hold."""
        return not sees_later(self.rule, self.gate)

    def without_lookahead(self) -> "Config":
        """The same configuration, which must be causal; else a RuleError."""
        if not self.is_causal:
            raise looks_ahead(self.rule, self.gate)
        return self

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {"rule": self.rule.to_json(), "gate": self.gate.to_json(), "metric": self.metric, "unit": self.unit,
                "shared": self.shared}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("experts.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        try:
            return cls(**{**value, "rule": rule_from_json(value["rule"]), "gate": gate_from_json(value["gate"])})
        except RuleError as error:
            raise FileError("experts.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


class Experts(Axis):
    """The choice of experts and their sum. It has no weights; a Sigmoid gate's bias is a part of the choice.

    Inputs: hidden [..., T, D], logits [..., T, C] (C is E, or for Soft the slots of all experts), up [E, F, D] or
    [E, 2F, D] with the gate's rows first, down [E, O, F], mask bool [..., T] of the tokens that are no padding, and
    what noise the logits hold; returns [..., T, O], 0 where a token keeps nothing. Minus infinity among the logits
    forbids. Gradients flow through what is kept and through its weights, not through the choice.

    Args:
        config: how to choose.
        num_experts: E.
        activation: of the experts, a name of `ACTIVATIONS`.
        causal: refuse what looks at later tokens.
        impl: the kernel, see `route`.
    Raises:
        RuleError: a causal layer with the rule Capacity or the gate Soft.
    """

    def __init__(self, config: Config, num_experts: int, *, activation: str = "silu", causal: bool = True,
                 impl: str = "auto"):
        super().__init__(config.rule, unit=config.unit)
        self.config = config
        self.gate = config.gate
        self.num_experts = num_experts
        self.activation = activation
        self.causal = causal
        self.impl = impl
        self.gauge = Gauge()
        balances = self.gate.speed > 0
        self.register_buffer("bias", torch.zeros(num_experts) if balances else None)
        self.register_buffer("counts", None, persistent=False)
        self.register_buffer("tokens", None, persistent=False)
        self.forget()
        self.refuse_lookahead()

    def refuse_lookahead(self) -> None:
        """Raises where a causal layer would look at later tokens; the rule may have changed since it was made."""
        if self.causal and sees_later(self.rule, self.gate):
            raise looks_ahead(self.rule, self.gate)

    def score(self, hidden, logits, up, down, mask=None, noise=None):
        self.check(hidden, logits, up, down, mask)
        with torch.no_grad():
            forbidden = logits.isneginf() if mask is None else logits.isneginf() | ~mask.unsqueeze(-1)
            return self.gate.scores(widened(logits), self.bias).masked_fill(forbidden, -torch.inf)

    def select(self, scores, *inputs):
        self.refuse_lookahead()
        listed = self.gate.shortlist(scores)
        selection = self.gate.rule(self.rule)(listed, unit=self.unit)
        if self.training and self.counts is not None:
            self.counts += selection.load().reshape(-1, self.num_experts).sum(0)
            self.tokens += (selection.permitted > 0).sum()
        keep = selection.mask()
        limited = self.limited(keep)
        if listed is scores and limited is keep:
            return selection
        return Selection.from_mask(limited, ~scores.isneginf(), unit=self.unit)

    def limited(self, keep: torch.Tensor) -> torch.Tensor:
        """What a gate's capacity leaves of `keep`. It drops in training alone, whose sequences are whole."""
        return self.gate.limit(keep) if self.training else keep

    def weigh(self, selection, scores, hidden, logits, up, down, mask=None, noise=None):
        # A token with no expert to choose from has no softmax, and a gradient through one would be NaN.
        nowhere = scores.isneginf().all(-1, keepdim=True)
        logits = widened(logits).masked_fill(nowhere, 0)
        weighed = self.gate.weigh(selection, logits)
        if self.gauge.is_heard:
            self.gauge(Sums.of(self.gate, self.choices(weighed, scores, logits), logits, noise))
        return weighed

    @torch.no_grad()
    def choices(self, weighed: Selection, scores: torch.Tensor, logits: torch.Tensor) -> Choices:
        """What the balance is told of a call that kept `weighed`."""
        rule, keep, forbidden = self.gate.rule(self.rule), weighed.mask(), scores.isneginf()
        wanted = weighed if self.limited(keep) is keep else rule(self.gate.shortlist(scores), unit=self.unit)
        if self.bias is None:
            return Choices(wanted, weighed, wanted.mask())
        plain = self.gate.scores(logits, None).masked_fill(forbidden, -torch.inf)
        return Choices(wanted, weighed, rule.keep(plain, ~forbidden, torch.zeros_like(forbidden)) & ~forbidden)

    def apply(self, selection, hidden, logits, up, down, mask=None, noise=None):
        stack = self.stack(up, down)
        if isinstance(self.gate, Soft):
            with in_full(hidden):
                dispatch = self.gate.dispatch(widened(logits), selection.mask())
            return soft.answer(selection, hidden, dispatch, stack, self.impl)
        answers = route(*self.routed(selection, hidden), stack, impl=self.impl)
        return answers.reshape(*hidden.shape[:-1], answers.shape[-1])

    @staticmethod
    def routed(selection: Selection, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, ids and weights without a batch, as `route` takes them."""
        return hidden.flatten(0, -2), selection.ids.flatten(0, -2), selection.weights.flatten(0, -2)

    def shortcut(self, hidden, logits, up, down, mask=None, noise=None):
        """The same for the gate Soft without masks of what all tokens keep, which take as long as the products.

        The reference is left to `apply`: it has gradients of gradients.
        """
        can = isinstance(self.gate, Soft) and mask is None and self.impl != "reference" and is_plain_call()
        if not can or self.gauge.is_heard:
            return None
        self.check(hidden, logits, up, down, mask)
        if not logits.numel() or not logits.detach().sum().isfinite():
            return None
        self.refuse_lookahead()
        return soft.mix(hidden, widened(logits), self.stack(up, down), self.impl)

    def account(self, selection, hidden, logits, up, down, mask=None, noise=None):
        kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
        weights = (up.numel() + down.numel()) // self.num_experts
        used = int((selection.load().reshape(-1, selection.num_candidates) > 0).any(0).sum()) // self.gate.slots
        done = kept * weights
        if isinstance(self.gate, Soft):
            slots = math.prod(hidden.shape[:-2]) * selection.num_candidates
            done = slots * weights + kept * (hidden.shape[-1] + down.shape[1])
        rows = math.prod(hidden.shape[:-1]) * (hidden.shape[-1] + down.shape[1])
        cost = Cost(multiply_adds=done, dense_multiply_adds=permitted // self.gate.slots * weights,
                    bytes=(rows + used * weights) * hidden.element_size(), choosing=permitted * hidden.shape[-1])
        return cost, *choose_impl(self.impl, *self.routed(selection, hidden), self.stack(up, down))

    def stack(self, up: torch.Tensor, down: torch.Tensor) -> Stack:
        """The experts as the kernel reads them; the gate's and the other rows are views of one weight."""
        if up.shape[1] == down.shape[2]:
            return Stack(up=up, down=down, activation=self.activation)
        gate, up = up.chunk(2, dim=1)
        return Stack(up=up, down=down, gate=gate, activation=self.activation)

    def check(self, hidden, logits, up, down, mask) -> None:
        """Raises a ShapeError unless the inputs fit together and this room."""
        experts = check_shape("experts", "down", down, "E O F", E=self.num_experts, F=self.unit)["E"]
        check_shape("experts", "up", up, "E F D", E=experts, D=hidden.shape[-1],
                    F=2 * self.unit if up.shape[1:2] == (2 * self.unit,) else self.unit)
        lead = hidden.shape[:-1]
        fits = hidden.dim() >= 2 and logits.shape == (*lead, experts * self.gate.slots)
        if not fits or (mask is not None and (mask.shape != lead or mask.dtype != torch.bool)):
            raise ShapeError("experts", expected=f"hidden [..., T, D], logits [..., T, {experts * self.gate.slots}], "
                             "mask bool [..., T]", do="score every token against every expert",
                             got=f"{list(hidden.shape)}, {list(logits.shape)}, "
                                 f"{None if mask is None else (mask.dtype, list(mask.shape))}")

    @torch.no_grad()
    def update_bias(self) -> None:
        """Moves the bias of each expert by the gate's `speed` towards the mean load; call it once an optimizer step.

        A gate Choice moves it towards the capacity. The loads are those of all calls in training since the last
        update, so that it does not matter in how many parts the batch came. With several processes, add up `counts`
        and `tokens` over them first.

        Raises:
            RuleError: a gate without a bias.
        Reference: Wang et al. 2024, arXiv 2408.15664, algorithm 1.
        """
        if self.bias is None:
            raise RuleError("update_bias", expected="a Choice gate, or a Sigmoid gate with a speed above 0",
                            got=repr(self.gate), do="balance other gates with a loss")
        direction = self.gate.direction(self.rule, self.counts.double(), self.tokens.double())
        self.bias += (self.gate.speed * direction).to(self.bias.dtype)
        self.forget()

    def forget(self) -> None:
        """Counts loads from here on, where the gate has a bias."""
        if self.bias is not None:
            self.counts = torch.zeros_like(self.bias, dtype=torch.int64)
            self.tokens = torch.zeros((), dtype=torch.int64, device=self.bias.device)

    def _apply(self, fn, recurse=True):
        """The bias moves in steps that bfloat16 would round away: only its device changes."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and not bias.is_meta and not self.bias.is_meta:
            self.bias = bias.to(self.bias.device)
        return self


def sees_later(rule: Rule, gate: Gate) -> bool:
    """Whether a token's choice or answer depends on what later tokens hold."""
    return isinstance(gate.rule(rule), Capacity) or isinstance(gate, Soft)


def looks_ahead(rule: Rule, gate: Gate) -> RuleError:
    """What a causal layer says of a choice that looks at later tokens."""
    return RuleError("experts", expected="a choice that looks at no later token", got=f"{rule} with {gate}",
                     do="choose by TopK, or a capacity with the gate Choice, or pass causal=False where tokens may see "
                        "later ones, as in an encoder")
