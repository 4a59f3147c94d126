"""Gates: from a router's logits to the number that chooses an expert and the number that weighs it.

| gate | chooses by | weighs by |
|---|---|---|
| Unit | z | 1: the sum over all experts is the dense layer |
| Softmax | z | softmax(z) over all experts; with a capacity, training drops what comes late (Switch) |
| Renormalised | z | softmax(z) over the kept (Mixtral) |
| Noisy | z + noise | softmax over the kept of the same (Shazeer); the noise is the router's |
| Sigmoid | σ(z) + bias, the best groups first | σ(z) ÷ its sum over the kept, times `scale` (DeepSeek-V3) |
| Task | z of the task, the same for all its tokens | softmax over the kept |
| Choice | E · softmax(z) - 1 + bias, which must reach 0 | softmax(z) over all experts |
| Soft | nothing: every token keeps every slot | softmax over slots, of slots that are softmax means of tokens |

How many are kept is a rule's business (`core/rules.py`): top-1, top-2, a mass; `Capacity` is expert choice, along the
sequence, and with the gate Choice by a threshold that sees no other token.
Logits z are [..., T, E], in fp32 or wider. References, by arXiv number: 1701.06538 (Noisy), 2101.03961 (Switch),
2401.04088 (Mixtral), 2408.15664 and 2412.19437 (Sigmoid), 2110.03742 (Task), 2202.09368 (expert choice),
2308.00951 (Soft).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import torch

from sentei.core.errors import FileError, RuleError
from sentei.core.rules import All, Capacity, Fixed, Rule, TopK
from sentei.core.selection import Selection

FAINT = 1e-20


class Gate(ABC):
    """What the logits of a router mean.

    Attributes:
        slots: candidates an expert has.
        speed: of the balancing bias; 0 where there is none.
        adds_up: whether the weights of a token add up to one number, whatever the router learns.
    """

    slots = 1
    speed = 0.0
    adds_up = False

    def fits(self, rule: Rule) -> bool:
        """Whether the gate means something under `rule`."""
        return True

    def rule(self, rule: Rule) -> Rule:
        """The rule that the scores are given to, where the room's is `rule`."""
        return rule

    def direction(self, rule: Rule, counts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """From -1 to 1, [E]: where the bias goes after a step in which counts [E] of so many tokens were chosen."""
        return torch.sign(counts.mean() - counts)

    def scores(self, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The number that chooses, [..., T, E], as a rule wants it."""
        return logits

    def shortlist(self, scores: torch.Tensor) -> torch.Tensor:
        """The same scores, -inf where the gate rules an expert out before the rule looks at it."""
        return scores

    def limit(self, keep: torch.Tensor) -> torch.Tensor:
        """Bool [..., T, E]: what is kept of `keep`, which a rule made."""
        return keep

    @abstractmethod
    def weigh(self, selection: Selection, logits: torch.Tensor) -> Selection:
        """The selection with the number that weighs."""

    def shares(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., T, E], 1 in sum over the experts: what the balance losses call the router's probabilities."""
        return logits.softmax(-1)

    def to_json(self) -> dict:
        """The gate as a JSON object."""
        return {"name": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class Unit(Gate):
    """Every kept expert counts 1, so that all of them are the dense layer; the router gets no gradient."""

    def weigh(self, selection, logits):
        return selection.weigh(torch.ones_like(logits))


@dataclass(frozen=True)
class Softmax(Gate):
    """Weighs by the softmax over all experts: Switch with TopK(1), expert choice with the rule Capacity.

    Nothing makes up for what is not kept, whether the rule or `capacity` left it out: the weights of a token add up to
    less than 1, of k experts to about k / E while the router is unsure, and to 0 where all were dropped, so that what
    stands beside the layer (a residual) carries the token. That is what teaches the router of one expert: weights that
    are made to add up, as Renormalised has them, would not depend on it.

    Args:
        capacity: None drops nothing. Else, in training, no expert takes more than `capacity` times the mean load of its
            sequence, rounded up: tokens come in order, and one that comes too late keeps nothing there. An earlier
            token never depends on what a later one holds, but on how many there are. So evaluation drops nothing:
            pieces of a sequence, read with a cache, would drop others than the whole.
    """

    capacity: float | None = None

    def __post_init__(self):
        if self.capacity is not None and not _is_number(self.capacity, above=0):
            raise RuleError("Softmax", expected="a capacity above 0, or None", got=repr(self.capacity),
                            do="choose another capacity, e.g. 1.25")

    def fits(self, rule):
        return self.capacity is None or isinstance(rule, TopK)

    def limit(self, keep):
        if self.capacity is None:
            return keep
        kept = keep.sum((-1, -2), keepdim=True).double()
        return keep & (keep.cumsum(-2) <= torch.ceil(self.capacity * kept / keep.shape[-1] - 1e-9))

    def weigh(self, selection, logits):
        return selection.weigh(logits.softmax(-1))


@dataclass(frozen=True)
class Renormalised(Gate):
    """Weighs by the softmax over the kept alone. One expert would always weigh 1, and its router learn nothing."""

    adds_up = True

    def fits(self, rule):
        return not (isinstance(rule, TopK) and rule.k == 1)

    def weigh(self, selection, logits):
        return selection.weigh_softmax(logits)


@dataclass(frozen=True)
class Noisy(Renormalised):
    """The same, of logits to which the router adds noise of a learned size while it trains; k of them, a smooth load
    being the chance to be among so many."""

    def fits(self, rule):
        return isinstance(rule, TopK) and super().fits(rule)


@dataclass(frozen=True)
class Task(Renormalised):
    """The same, of logits that are one row a task: all tokens of a task keep the same experts.

    Args:
        tasks: how many there are.
    """

    tasks: int = 1

    def __post_init__(self):
        if type(self.tasks) is not int or self.tasks < 1:
            raise RuleError("Task", expected="tasks from 1", got=repr(self.tasks), do="count the tasks")


@dataclass(frozen=True)
class Sigmoid(Gate):
    """Chooses by σ(z) + bias among the best groups of experts, weighs by σ(z) made to add up to `scale`.

    Args:
        scale: what the weights of a token add up to.
        groups: equal runs of experts; a group is worth the sum of its two best (its best, if it has one expert).
        kept_groups: groups a token may choose from.
        speed: what an expert's bias moves at each update, up if it had less than the mean load, down if more.
    """

    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    speed: float = 1e-3
    adds_up = True

    def __post_init__(self):
        whole = type(self.groups) is int and type(self.kept_groups) is int
        if not (whole and 1 <= self.kept_groups <= self.groups and _is_number(self.scale, above=0)
                and _is_number(self.speed, above=-1e-300)):
            raise RuleError("Sigmoid", expected="scale above 0, kept_groups from 1 to groups, speed from 0",
                            got=repr(self), do="change that field")

    def fits(self, rule):
        """A share of a mass is of softmax scores, which these are not; one expert would always weigh `scale`."""
        return isinstance(rule, All | TopK | Capacity | Fixed) and not (isinstance(rule, TopK) and rule.k == 1)

    def scores(self, logits, bias):
        return logits.sigmoid() if bias is None else logits.sigmoid() + bias

    def shortlist(self, scores):
        if self.kept_groups == self.groups:
            return scores
        if scores.shape[-1] % self.groups:
            raise RuleError("Sigmoid", expected=f"experts in {self.groups} equal groups", got=str(scores.shape[-1]),
                            do="choose groups that divide the experts")
        grouped = scores.unflatten(-1, (self.groups, -1))
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = TopK(self.kept_groups)(worth).mask()
        return grouped.masked_fill(~best.unsqueeze(-1), -torch.inf).flatten(-2)

    def weigh(self, selection, logits):
        weighed = selection.weigh(logits.sigmoid())
        total = weighed.weights.sum(-1, keepdim=True) + 1e-20
        return Selection(ids=weighed.ids, weights=weighed.weights / total * self.scale, permitted=weighed.permitted,
                         num_candidates=weighed.num_candidates, unit=weighed.unit)

    def shares(self, logits):
        sizes = logits.sigmoid()
        return sizes / (sizes.sum(-1, keepdim=True) + 1e-20)


@dataclass(frozen=True)
class Choice(Gate):
    """Expert choice without a look ahead: an expert keeps the tokens whose share of it reaches its threshold.

    The thresholds are learned beside the gradient, as the bias of a Sigmoid gate is: after a step in which an expert
    kept more than the rule's `Capacity` of the tokens its threshold rises, else it falls. So the capacity holds on
    average over steps and not in each sequence; a token keeps none, some or all of the experts, by itself alone, in
    training and in generation alike. Ranking tokens in training and imitating the ranks in generation, as the room
    depth does, would let training look ahead.

    Args:
        speed: what a threshold moves at an update by an expert that kept nothing, or twice the capacity; an even share
            of an expert counts 1.
    """

    speed: float = 0.1

    def __post_init__(self):
        if not _is_number(self.speed, above=0):
            raise RuleError("Choice", expected="a speed above 0", got=repr(self.speed), do="choose one, e.g. 0.1")

    def fits(self, rule):
        return isinstance(rule, All | Fixed) or isinstance(rule, Capacity) and not isinstance(rule.capacity, tuple)

    def rule(self, rule):
        return _Reach() if isinstance(rule, Capacity) and rule.capacity < 1 else All() if (
            isinstance(rule, Capacity)) else rule

    def direction(self, rule, counts, tokens):
        target = rule.capacity * tokens if isinstance(rule, Capacity) else counts
        return ((target - counts) / target.clamp(min=1)).clamp(-1, 1)

    def scores(self, logits, bias):
        return logits.softmax(-1) * logits.shape[-1] - 1 + (0 if bias is None else bias)

    def weigh(self, selection, logits):
        return selection.weigh(logits.softmax(-1))


class _Reach(Rule):
    """Keeps what reaches 0; what Choice makes of a capacity."""

    def keep(self, scores, permitted, forced):
        return (scores >= 0) & permitted | forced


@dataclass(frozen=True)
class Soft(Gate):
    """No choice: every expert works on `slots` weighed means of all tokens, and every token on all slots' answers.

    A token's output depends on all tokens, later ones too.

    Args:
        slots: an expert has.
    """

    slots: int = 1

    def __post_init__(self):
        if type(self.slots) is not int or self.slots < 1:
            raise RuleError("Soft", expected="slots from 1", got=repr(self.slots), do="give an expert a slot")

    def fits(self, rule):
        return isinstance(rule, All)

    def weigh(self, selection, logits):
        return selection.weigh_softmax(near(logits, -1))

    def dispatch(self, logits: torch.Tensor, permitted: torch.Tensor) -> torch.Tensor:
        """[..., T, S], 1 in sum over the permitted tokens: what a slot is made of; 0 where no token is permitted."""
        some = permitted.any(-2, keepdim=True)
        return near(logits.masked_fill(~permitted, -torch.inf), -2).masked_fill(~some, 0).softmax(-2) * some


def near(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """The logits, -inf where their softmax along `dim` is below FAINT of the largest: it cannot be seen in a sum.

    Numbers as small as 1e-40, which softmax makes of such logits, take processors a hundred times as long as others.
    """
    if not logits.numel():
        return logits
    with torch.no_grad():
        faint = logits < logits.amax(dim, keepdim=True) + math.log(FAINT)
    return logits.masked_fill(faint, -torch.inf)


GATES = {"unit": Unit, "softmax": Softmax, "renormalised": Renormalised, "noisy": Noisy, "task": Task,
         "sigmoid": Sigmoid, "choice": Choice, "soft": Soft}


def gate_from_json(value: dict) -> Gate:
    """The gate written by `Gate.to_json`; unknown names and keys are refused with a FileError."""
    parameters = dict(value) if isinstance(value, dict) else {}
    name = parameters.pop("name", None)
    kind = GATES.get(name) if isinstance(name, str) else None
    if kind is None or set(parameters) != set(kind.__dataclass_fields__):
        raise FileError("gate", expected=f"one of {', '.join(GATES)} with its parameters", got=repr(value)[:200],
                        do="write plans with sentei")
    try:
        return kind(**parameters)
    except RuleError as error:
        raise FileError("gate", expected=error.expected, got=error.got, do="write plans with sentei") from error


def _is_number(value: object, *, above: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf
