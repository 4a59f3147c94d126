"""Deliberately wrong heads, ranks and channels must be rejected by comparisons with numbers worked out by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from sentei.axes.channels import Channels
from sentei.axes.channels import Config as ChannelsConfig
from sentei.axes.heads import Shared
from sentei.axes.rank import Config, Rank
from sentei.core.rules import Rule, TopK
from sentei.core.tracing import trace


def check_shared(rule: type[Rule]) -> None:
    """Neighbouring query heads share a key/value head, and each has one."""
    for heads, groups in ((8, 8), (8, 4), (8, 1), (6, 2)):
        ids = rule()(torch.zeros(heads, groups)).ids
        assert ids.flatten().tolist() == [h // (heads // groups) for h in range(heads)]


class Interleaved(Shared):
    def keep(self, scores, permitted, forced):
        own = torch.arange(scores.shape[-2])[:, None] % scores.shape[-1]
        return own == torch.arange(scores.shape[-1])


class FirstHead(Shared):
    def keep(self, scores, permitted, forced):
        return torch.arange(scores.shape[-1]).expand_as(scores) == 0


@pytest.mark.parametrize("mutant", [Interleaved, FirstHead], ids=lambda mutant: mutant.__name__)
def test_a_wrong_map_of_heads_is_rejected(mutant):
    check_shared(Shared)
    with pytest.raises(AssertionError):
        check_shared(mutant)


def check_rank(room: type[Rank]) -> None:
    """The two directions of a token whose changes are largest, as written in the formula."""
    x, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0, 9.0, 1.0]])
    a = torch.tensor([[3.0, 0.0], [0.0, -2.0], [1.0, 0.0], [0.0, 1.0]])
    layer = room(Config(rule=TopK(2), rank=4, alpha=2))
    for heard in (False, True):
        with trace(layer) if heard else nullcontext():
            torch.testing.assert_close(layer(x, a, b), torch.tensor([[0.5 * (-4 + 9)]]))


class WithoutB(Rank):
    def sizes(self, projected, b):
        return super().sizes(projected, torch.ones_like(b))


class SignedSizes(Rank):
    def sizes(self, projected, b):
        return projected * b.norm(dim=0)


class WeighsByTheChoice(Rank):
    def kept_rows(self, selection, b, onto):
        return super().kept_rows(replace(selection, weights=selection.weights.abs()), b, onto)


class Unscaled(Rank):
    def kept_rows(self, selection, b, onto):
        return super().kept_rows(selection, b, onto) / self.scale


@pytest.mark.parametrize("mutant", [WithoutB, SignedSizes, WeighsByTheChoice, Unscaled],
                         ids=lambda mutant: mutant.__name__)
def test_a_wrong_rank_is_rejected(mutant):
    check_rank(Rank)
    with pytest.raises(AssertionError):
        check_rank(mutant)


def check_channels(room: type[Channels]) -> None:
    """Two images that keep one map each: σ of its logit times its pixel times its weight."""
    maps, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[..., None, None], torch.tensor([[5.0, 7.0]])[..., None, None]
    logits = torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
    for images, expected in ((2, [2.5, 14.0]), (1, [2.5])):
        output = room(ChannelsConfig(rule=TopK(1)))(maps[:images], logits[:images], weight)
        assert output.flatten().tolist() == expected


class Ungated(Channels):
    def convolve(self, maps, gates, weight, bias):
        return super().convolve(maps, (gates > 0).to(gates.dtype), weight, bias)


class KeepsAll(Channels):
    def apply(self, selection, maps, logits, weight, bias=None):
        return self.convolve(maps, logits.sigmoid(), weight, bias)


class FirstImageChooses(Channels):
    def apply(self, selection, maps, logits, weight, bias=None):
        return self.convolve(maps, logits.sigmoid() * selection.mask()[:1, 0], weight, bias)


@pytest.mark.parametrize("mutant", [Ungated, KeepsAll, FirstImageChooses], ids=lambda mutant: mutant.__name__)
def test_wrong_channels_are_rejected(mutant):
    check_channels(Channels)
    with pytest.raises(AssertionError):
        check_channels(mutant)
