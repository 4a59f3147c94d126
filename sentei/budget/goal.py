"""What the user asks for: a bound on quality or on speed."""

from dataclasses import dataclass, replace

from sentei.budget.judge import Judgement
from sentei.core.errors import SenteiError
from sentei.measurement.latency import Comparison


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The bound: at least this quality, as fast as possible; or at least this speed-up, as good as possible.

    Args:
        quality: as the workload's measure tells it, 1 for no loss; above 0 and at most 1; or None.
        speed: dense seconds ÷ pruned seconds, at least 1; or None.
        lookahead: whether the quality of the plan as it runs is enough, where a query block's choice has seen its later
            queries; else that of `Plan.without_lookahead` must keep the bound too. What is sought is the same: slack
            is measured with lookahead.
    """

    quality: float | None = None
    speed: float | None = None
    lookahead: bool = True

    def __post_init__(self):
        if (self.quality is None) == (self.speed is None):
            raise SenteiError("goal", expected="either a quality or a speed", got=repr(self), do="name one of them")
        if not isinstance(self.lookahead, bool):
            raise SenteiError("goal", expected="lookahead True or False", got=repr(self.lookahead)[:200],
                              do="lookahead=False is what --no-lookahead says")
        if self.quality is not None and not 0 < self.quality <= 1:
            raise SenteiError("--quality", expected="a number above 0 and at most 1", got=str(self.quality),
                              do="0.99 means at most about 1 % more perplexity")
        if self.speed is not None and not 1 <= self.speed < float("inf"):
            raise SenteiError("--speed", expected="a number from 1", got=str(self.speed),
                              do="1.5 means half again as fast as dense")

    def relaxed(self, times: float) -> "Goal":
        """The goal with a quality at which so many times as many nats may be lost; only where a quality is asked."""
        return replace(self, quality=self.quality ** times)

    def is_good(self, judgement: Judgement) -> bool:
        """Whether a plan may be chosen: its quality less one standard error keeps the bound."""
        quality = judgement.quality
        return (quality.value + quality.low) / 2 >= self.quality

    def shortfall(self, quality: float, comparison: Comparison) -> str:
        """Why the bound is not met by a plan of this quality (the lowest that counts); empty when it is."""
        if self.speed is not None:
            reached = comparison.speedup()
            return "" if reached >= self.speed else f"the fastest plan tried is {reached:.2f} times as fast as dense"
        if quality < self.quality:
            return f"quality {quality:.4f} on held-out text, below {self.quality}"
        if comparison.speedup() <= 1:
            return f"no plan that keeps quality {self.quality} is faster than the dense model on this machine"
        return ""
