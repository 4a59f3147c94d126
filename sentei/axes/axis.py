"""What every room is: score → select → apply, and a tap the selection passes through."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from sentei.core.cost import Cost
from sentei.core.rules import Rule
from sentei.core.selection import Selection
from sentei.core.tracing import Span, Tap


class Axis(nn.Module, ABC):
    """A layer that decides what not to compute. Rooms implement `score`, `apply` and `cost`; `forward` is final.

    Args:
        rule: from scores to a selection.
        unit: how many tokens (neurons, rows) a candidate stands for.
    """

    def __init__(self, rule: Rule, unit: int = 1):
        super().__init__()
        self.rule = rule
        self.unit = unit
        self.tap = Tap()

    def forward(self, *inputs) -> torch.Tensor:
        """Scores the candidates, selects, and computes what was kept."""
        output = None if self.tap.is_heard else self.shortcut(*inputs)
        if output is not None:
            return output
        scores = self.score(*inputs)
        selection = self.select(scores, *inputs)
        selection = self.tap(self.weigh(selection, scores, *inputs), lambda: self.account(selection, *inputs),
                             room=type(self).__name__.lower(), span=self.span(*inputs))
        return self.apply(selection, *inputs)

    @abstractmethod
    def score(self, *inputs) -> torch.Tensor:
        """Float [..., Q, C]: the number that chooses; -inf forbids."""

    def select(self, scores: torch.Tensor, *inputs) -> Selection:
        """What the rule keeps."""
        return self.rule(scores, forced=self.forced(*inputs), unit=self.unit)

    @abstractmethod
    def apply(self, selection: Selection, *inputs) -> torch.Tensor:
        """Computes what was kept and combines it."""

    @abstractmethod
    def account(self, selection: Selection, *inputs) -> tuple[Cost, str, str]:
        """What `apply` costs, the kernel that runs and why."""

    def span(self, *inputs) -> Span | None:
        """The tokens that queries and candidates stand for, where that is not one token a query."""
        return None

    def shortcut(self, *inputs) -> torch.Tensor | None:
        """The same output in fewer steps, where a room has a kernel for several at once; else None.

        It is used while no trace listens: then nobody needs the selection.
        """
        return None

    def forced(self, *inputs) -> torch.Tensor | None:
        """Bool [..., Q, C] of candidates no rule may drop; none by default."""
        return None

    def weigh(self, selection: Selection, scores: torch.Tensor, *inputs) -> Selection:
        """Sets the number that weighs; by default every kept candidate counts 1."""
        return selection
