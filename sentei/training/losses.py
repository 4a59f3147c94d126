"""What is minimised: the loss of the next token, and whatever rooms add for themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sentei.axes.depth import Depth
from sentei.axes.experts.balance import ADDITIVE, Balance, Sums, balancing
from sentei.core.errors import require
from sentei.core.tracing import trace
from sentei.measurement.specialisation import dead, entropy, violation
from sentei.training.parallel import World

# Opened around one forward pass; what it yields gives, after that pass, a number to be added to the loss, or None.
Term = Callable[[nn.Module], AbstractContextManager[Callable[[], torch.Tensor | None]]]


def next_token(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of each token after the first, in nats; float32 or wider.

    Args:
        model: from tokens [B, T] to logits [B, T, V].
        windows: int64 [B, T + 1].
    """
    logits = model(windows[:, :-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.flatten(0, 1).to(wide), windows[:, 1:].flatten())


@contextmanager
def of_rooms(model: nn.Module) -> Iterator[Callable[[], torch.Tensor | None]]:
    """The term of the rooms that offer `auxiliary(records)`, a weighed loss made of their records of the pass.

    A record is detached; a room whose loss needs a gradient holds the numbers it is made of itself, until it is asked.
    Without such a room nothing is traced.
    """
    rooms = [(path, module) for path, module in model.named_modules() if hasattr(module, "auxiliary")]
    if not rooms:
        yield lambda: None
        return
    with trace(model) as records:
        yield lambda: sum(room.auxiliary(records.at(path)) for path, room in rooms)


@torch.no_grad()
def window_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The mean loss of each window [N, context + 1], float64 [N], nats a byte."""
    found = []
    for part in windows.split(8):
        logits, targets = model(part[:, :-1]).float(), part[:, 1:]
        found.append(cross_entropy(logits.mT, targets, reduction="none").double().mean(1))
    return torch.cat(found)


@contextmanager
def of_predictors(model: nn.Module) -> Iterator[Callable[[], torch.Tensor | None]]:
    """The term that teaches the predictors of Mixture-of-Depths what the choice along the sequence keeps.

    Its gradient reaches the predictors alone; the rest of the model feels it only where the norm of all gradients is
    clipped. It is computed inside the pass, where the weights of several processes are together. Adds the losses of
    all rooms that need a predictor; None without such a room. See Raposo et al. 2024, arXiv 2404.02258.
    """
    losses: list[torch.Tensor] = []

    def learn(room: Depth, given: tuple) -> None:
        if room.training and room.looks_along and torch.is_grad_enabled():
            losses.append(room.predictor_loss(*given[:2]))

    handles = [room.register_forward_pre_hook(learn) for room in model.modules() if isinstance(room, Depth)]
    try:
        yield lambda: sum(losses) if losses else None
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the losses of the experts' balance count in the loss; 0 leaves one out. See `axes.experts.balance`.

    Args:
        switch: E times the sum of the experts' load times mean probability; 1 when even.
        importance: the squared coefficient of variation of the experts' summed weights.
        load: the same of the smooth load of noisy gates.
        z: the mean squared log of the sum of exponents of the logits.
        sequence: as `switch`, of each sequence by itself.
    """

    switch: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    z: float = 0.0
    sequence: float = 0.0

    def __post_init__(self):
        numbers = all(isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < 1e6
                      for weight in asdict(self).values())
        require("balance", self, {f"{', '.join(asdict(self))} as numbers from 0": numbers})

    def used(self) -> dict[str, float]:
        """The weights above 0."""
        return {name: weight for name, weight in asdict(self).items() if weight}


class Balanced:
    """The term of the experts' balance over one step, and its numbers. One object belongs to one run.

    The losses are those of the whole step, in however many passes and processes it comes: loss and gradient do not
    depend on that, but for the draws of a router with noise. Where a loss is no mean of the passes' losses (switch,
    importance, load) a step of several passes runs each twice: first for the sums alone, then for the gradient.

    Args:
        weights: of the losses; with none there are only numbers.
        world: the processes whose passes make a step.
    """

    def __init__(self, weights: Weights, world: World | None = None):
        self.weights, self.world = weights.used(), World() if world is None else world
        self.seen, self.whole, self.parts = Balance(), None, 1

    def begin(self, model: nn.Module, passes: Sequence[Callable[[], object]]) -> None:
        """Begins a step.

        Args:
            passes: each runs a part of the step forward; those that follow under this term do the same again.
        """
        self.seen, self.whole, self.parts = Balance(), None, 1
        if len(passes) == 1 or self.is_additive:
            return
        self.whole, self.parts = Balance(), len(passes)
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for run in passes:  # with gradients on, for the kernels that training runs; its graph is gone at once
                with balancing(model) as heard:
                    run()
                self.whole.take(heard)
        self.whole = added_up(self.whole, self.world)

    @property
    def is_additive(self) -> bool:
        """Whether each loss is the mean of the passes' losses."""
        return set(self.weights) <= set(ADDITIVE)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Callable[[], torch.Tensor | None]]:
        """Listens to one pass of the step; a `Term`."""
        with balancing(model) as heard:
            yield lambda: self.of_pass(heard)

    def of_pass(self, heard: Balance) -> torch.Tensor | None:
        """What the pass adds: the step's loss in value, and the pass's share of the gradient times the passes."""
        self.seen.take(heard)
        if not self.weights:
            return None
        whole = self.whole
        if whole is None and (self.world.size == 1 or self.is_additive):
            return heard.loss(**self.weights)
        if whole is None:
            whole = Balance()
            whole.take(heard)
            whole = added_up(whole, self.world)
        share = heard.part(whole, **self.weights) * self.parts * self.world.size
        return share + (whole.loss(**self.weights) - share).detach()

    def numbers(self) -> dict[str, float]:
        """How even the step was: nothing without experts, else over the layers

        violation, the largest count of an expert ÷ mean - 1; entropy, the smallest of the counts, 1 when even; unused,
        how many experts no token wanted; and dead, how many of these are surely below 1 % of the mean rate (0.95).
        All processes call it together, once a step.
        """
        self.seen = added_up(self.seen, self.world)
        layers = [(sums.counts.cpu(), int(sums.tokens)) for sums in self.seen.values()]
        if not layers:
            return {}
        return {"violation": max(violation(counts) for counts, _ in layers),
                "entropy": min(entropy(counts) for counts, _ in layers),
                "unused": sum(int((counts == 0).sum()) for counts, _ in layers),
                "dead": sum(len(dead(counts, tokens)) for counts, tokens in layers)}


def added_up(balance: Balance, world: World) -> Balance:
    """The sums of all processes, which have heard the same layers; one message. Those of `balance` have no graph."""
    if world.size == 1 or not balance:
        return balance
    known = [(path, name, value) for path, sums in balance.items() for name, value in vars(sums).items()
             if value is not None]
    total = world.sum(torch.cat([value.flatten() for _, _, value in known]))
    whole = {path: {} for path in balance}
    for (path, name, value), part in zip(known, total.split([value.numel() for *_, value in known]), strict=True):
        whole[path][name] = part.view_as(value)
    return Balance({path: Sums(**sums) for path, sums in whole.items()})
