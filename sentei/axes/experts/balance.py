"""Balance: how evenly a router spreads its tokens, as losses of sums that add up over micro-batches.

    with balancing(model) as balance:
        for batch in micro_batches:                      # one optimizer step
            outputs.append(model(batch))
    (task_loss(outputs) + balance.loss(switch=0.01, z=1e-3)).backward()

Each layer has its own loss, and padding counts nowhere. The losses are made from the sums of the whole step, so that
splitting a batch changes nothing; a mean of each part's own loss would ask every part to be balanced by itself, which
costs specialisation (Qiu et al. 2025, arXiv 2501.11873). Where the parts' graphs cannot be kept until the end,
`Balance.part` gives each part's share of the gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.experts.gates import Gate
from sentei.core.errors import RuleError
from sentei.core.selection import Selection
from sentei.core.tracing import Point, listening


class Noise(NamedTuple):
    """What a noisy router added: the logits without it, and its standard deviation, both [..., T, E]."""

    clean: torch.Tensor
    spread: torch.Tensor


class Choices(NamedTuple):
    """What one call chose: by the rule, before any capacity; what was kept, weighed; and, bool [..., T, E], what the
    rule would have kept without a balancing bias."""

    wanted: Selection
    weighed: Selection
    plain: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """One layer's routing, summed over the tokens that count.

    Args:
        tokens: [], how many they are.
        counts: [E], tokens an expert was chosen by, before any capacity.
        shares: [E], of the router's probabilities.
        importance: [E], of the weights.
        z: [], of the squared log of the sum of exponents of the logits.
        sequence: [], of each sequence's own balance, see `sequence_loss`.
        sequences: [], how many have a token.
        load: [E], of the chance to be chosen with new noise; None where the router adds none.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    shares: torch.Tensor
    importance: torch.Tensor
    z: torch.Tensor
    sequence: torch.Tensor
    sequences: torch.Tensor
    load: torch.Tensor | None = None

    @classmethod
    def of(cls, gate: Gate, choices: Choices, logits: torch.Tensor, noise: Noise | None) -> "Sums":
        """The sums of one call.

        Args:
            logits: [..., T, E], with noise if there was any; a sequence's tokens are those along T.
        """
        wanted = choices.wanted
        real = (wanted.permitted > 0).unsqueeze(-1)
        clean = logits if noise is None else noise.clean
        over_tokens = tuple(range(logits.dim() - 1))

        def total(values: torch.Tensor) -> torch.Tensor:
            return values.masked_fill(~real, 0).sum(over_tokens)

        shares, tokens = gate.shares(clean).masked_fill(~real, 0), real.sum(-2, dtype=logits.dtype)
        plain = choices.plain.sum(-2, dtype=logits.dtype)
        each = evenness(plain, shares.sum(-2) / tokens.clamp(min=1))
        return cls(tokens=tokens.sum(), counts=total(wanted.mask().to(logits.dtype)), shares=shares.sum(over_tokens),
                   importance=total(choices.weighed.dense_weights()),
                   z=total(clean.logsumexp(-1, keepdim=True).square())[0],
                   sequence=each.sum(), sequences=(tokens > 0).sum(dtype=logits.dtype),
                   load=None if noise is None else total(chance(wanted, logits, noise)))

    def __add__(self, other: "Sums") -> "Sums":
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return Sums(**{name: None if a is None or b is None else a + b for name, (a, b) in pairs.items()})

    def detached(self) -> "Sums":
        """The same numbers without the graph that made them."""
        return Sums(**{name: value.detach() for name, value in vars(self).items() if value is not None})

    def leaves(self) -> "Sums":
        """The same numbers, each a leaf that wants a gradient."""
        return Sums(**{name: value.requires_grad_() for name, value in vars(self.detached()).items()
                       if value is not None})


def chance(wanted: Selection, noisy: torch.Tensor, noise: Noise) -> torch.Tensor:
    """The chance of each expert to be among the k chosen if its noise alone were drawn again, [..., T, E].

    P(x, i) = Φ((z_i - the k-th largest noisy logit of the others) ÷ spread_i), Shazeer et al. 2017, appendix A. Each
    token has its own k: where it may choose among fewer than the rule's, those are certain. What -inf forbids, and a
    token that keeps nothing, have no chance.
    """
    chosen, k, forbidden = wanted.mask(), wanted.count().unsqueeze(-1), noisy.isneginf()
    ordered = F.pad(noisy.sort(dim=-1, descending=True).values, (0, 1), value=-torch.inf)
    rival = ordered.gather(-1, torch.where(chosen, k, (k - 1).clamp(min=0)))
    certain, never = rival.isneginf() & chosen, forbidden | (k == 0)
    # What has no rival or is none itself is left out before a difference of infinities can be made.
    ahead = noise.clean.masked_fill(forbidden, 0) - rival.masked_fill(rival.isneginf(), 0)
    return torch.special.ndtr(ahead / noise.spread).masked_fill(certain, 1).masked_fill(never, 0)


def switch_loss(sums: Sums) -> torch.Tensor:
    """E Σ_i f_i P_i: f the share of the choices, without gradient, P the mean probability; 1 when even, E at most.

    Reference: Fedus et al. 2021, arXiv 2101.03961, eq. 4-6; f adds up to 1 whatever the number of choices.
    """
    return evenness(sums.counts, sums.shares / sums.tokens.clamp(min=1))


def sequence_loss(sums: Sums) -> torch.Tensor:
    """The mean of the sequences' own losses, each as `switch_loss`, with choices as they are without a bias.

    A mean over sequences is the same for a batch and for its parts, so that it needs no sums of the whole step.

    Reference: DeepSeek-V3, arXiv 2412.19437, eq. 17-20.
    """
    return sums.sequence / sums.sequences.clamp(min=1)


def importance_loss(sums: Sums) -> torch.Tensor:
    """The squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 6-7)."""
    return squared_variation(sums.importance)


def load_loss(sums: Sums) -> torch.Tensor:
    """The squared coefficient of variation of the smooth load (Shazeer et al. 2017, appendix A).

    Raises:
        RuleError: a router without noise.
    """
    if sums.load is None:
        raise RuleError("balance", expected="a Noisy gate in training, for the smooth load",
                        got="a router without noise", do="use the loss 'switch' or 'importance'")
    return squared_variation(sums.load)


def z_loss(sums: Sums) -> torch.Tensor:
    """The mean of log² Σ_i exp(z_i), which keeps logits small (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    return sums.z / sums.tokens.clamp(min=1)


def evenness(counts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """[...], from counts and shares [..., E]: E Σ_i f_i P_i with f the counts made to add up to 1, and P the shares."""
    return counts.shape[-1] * (counts / counts.sum(-1, keepdim=True).clamp(min=1) * shares).sum(-1)


def squared_variation(values: torch.Tensor) -> torch.Tensor:
    """Variance ÷ squared mean over the experts; 0 for one expert and where nothing was routed."""
    return values.var(correction=0) / (values.mean().square() + 1e-10)


LOSSES = {"switch": switch_loss, "importance": importance_loss, "load": load_loss, "z": z_loss,
          "sequence": sequence_loss}
# Of these a step's loss is the mean of its parts' losses, if the parts are of one size.
ADDITIVE = ("z", "sequence")


class Balance(dict[str, Sums]):
    """The sums of each layer, by module path, over all calls since it was made."""

    def add(self, path: str, sums: Sums) -> None:
        """Adds one call of a layer."""
        self[path] = self[path] + sums if path in self else sums

    def take(self, other: "Balance") -> None:
        """Adds the sums of another balance, without their graphs."""
        for path, sums in other.items():
            self.add(path, sums.detached())

    def loss(self, **weights: float) -> torch.Tensor:
        """The weighed losses, named as in LOSSES, summed over the layers.

        Raises:
            RuleError: an unknown name, no name, or no layer that routed.
        """
        unknown = sorted(set(weights) - set(LOSSES))
        if unknown or not weights or not self:
            raise RuleError("balance", expected=f"weights of {', '.join(LOSSES)}, and a layer that routed",
                            got=f"{', '.join(unknown) or 'known names'}, {len(weights)} weights, {len(self)} layers",
                            do="name the losses, and call the model inside the block")
        return sum(weight * LOSSES[name](sums) for sums in self.values() for name, weight in weights.items())

    def part(self, step: "Balance", **weights: float) -> torch.Tensor:
        """A number whose gradient is what these calls add to the gradient of `step.loss(**weights)`.

        Backward after every micro-batch then does what one backward at the end would do. Its value means nothing.

        Args:
            step: the sums of all micro-batches of the step, e.g. of a first pass without gradients.
        """
        whole = Balance({path: sums.leaves() for path, sums in step.items()})
        places = [(path, name) for path in self for name in ("shares", "importance", "z", "load", "sequence")
                  if getattr(whole[path], name) is not None]
        slopes = torch.autograd.grad(whole.loss(**weights), [getattr(whole[path], name) for path, name in places],
                                     allow_unused=True)
        return sum((getattr(self[path], name) * slope).sum() for (path, name), slope in zip(places, slopes, strict=True)
                   if slope is not None)


class Gauge(Point):
    """The point in a room where its sums can be read, as selections are at a `Tap`."""

    def forward(self, sums: Sums) -> None:
        """Hands the sums to whoever listens."""
        for balance, path in self._listeners:
            balance.add(path, sums)


@contextmanager
def balancing(model: nn.Module, into: Balance | None = None) -> Iterator[Balance]:
    """Sums the routing of every mixture of experts in `model` for as long as the block lasts, with gradients.

    Args:
        into: the balance to add to; a new one by default.
    Cost: a few sums over [T, E] a layer; the graph of the routers' logits until the loss is gone.
    """
    balance = Balance() if into is None else into
    with listening(model, Gauge, balance):
        yield balance
