"""Deliberately wrong kernels and rules must be rejected by the comparisons the real tests use."""

from dataclasses import replace

import pytest
import torch
from oracle import CASES, check_attend

from sentei.core.definition import apply
from sentei.core.rules import Mass, Rule, TopK
from sentei.core.selection import Selection
from sentei.kernels.attention import Tiles, eager, reference


def regridded(tiles: Tiles, **changes) -> Tiles:
    """The same kept tiles with another idea of what is permitted, split anew into full and partial."""
    grid = replace(tiles.grid, **changes)
    if tiles.is_everything:
        return Tiles(grid=grid)
    keep = tiles.mask() | (grid.permitted(tiles.full_count.device) & ~tiles.grid.permitted(tiles.full_count.device))
    return Tiles.from_mask(keep, grid)


def off_by_one(query, key, value, tiles, **extra):
    """A token sees the next one: one key in front, as padding, moves every query one position on."""
    grid = tiles.grid
    if not grid.causal or grid.num_queries == 0:
        return eager.attend(query, key, value, tiles, **extra)
    batch, heads = query.shape[0], query.shape[2]
    listed = tiles.listed(batch, heads, query.device)
    pairs = listed.mask().repeat_interleave(heads // listed.full_count.shape[1], 1)
    pairs = pairs.repeat_interleave(grid.query_block, 2).repeat_interleave(grid.key_block, 3)
    positions = torch.arange(grid.num_queries) + grid.offset + 1
    seen = pairs[:, :, :grid.num_queries, :grid.num_keys] & (torch.arange(grid.num_keys) <= positions[:, None])
    if grid.lengths is not None:
        keys = torch.arange(grid.num_keys)
        seen = seen & ((keys >= grid.lengths[:, :1]) & (keys < grid.lengths[:, 1:]))[:, None, None]
    unit = replace(grid, query_block=1, key_block=1, causal=False, window=None)
    return eager.attend(query, key, value, Tiles.from_mask(seen, unit), **extra)


def forgotten_causality(query, key, value, tiles, **extra):
    return eager.attend(query, key, value, regridded(tiles, causal=False, window=None), **extra)


def forgotten_element_mask(query, key, value, tiles, **extra):
    """Partial tiles are taken as if they were full."""
    if tiles.is_everything or tiles.partial_ids.numel() == 0:
        return eager.attend(query, key, value, tiles, **extra)
    return eager.attend(query, key, value, regridded(
        Tiles.from_mask(tiles.mask(), tiles.grid), causal=False, window=None), **extra)


def forgotten_tiles(query, key, value, tiles, **extra):
    """Everything permitted is computed."""
    return eager.attend(query, key, value, Tiles(grid=tiles.grid), **extra)


def forgotten_partial_tiles(query, key, value, tiles, **extra):
    if tiles.is_everything:
        return eager.attend(query, key, value, tiles, **extra)
    full = tiles.mask() & tiles.grid.full(query.device)
    return eager.attend(query, key, value, Tiles.from_mask(full, tiles.grid), **extra)


def unscaled(query, key, value, tiles, *, scale, **extra):
    return eager.attend(query, key, value, tiles, scale=1.0, **extra)


def forgotten_window(query, key, value, tiles, **extra):
    return eager.attend(query, key, value, regridded(tiles, window=None), **extra)


def forgotten_softcap(query, key, value, tiles, *, softcap=0.0, **extra):
    return eager.attend(query, key, value, tiles, **extra)


def swapped_groups(query, key, value, tiles, **extra):
    """Query head h reads key/value head h mod G instead of h ÷ (H / G)."""
    per_group, groups = query.shape[2] // key.shape[2], key.shape[2]
    order = (torch.arange(query.shape[2]) // per_group + torch.arange(query.shape[2]) % per_group) % groups
    return eager.attend(query, key[:, :, order], value[:, :, order], tiles, **extra)


def dropped_padding(query, key, value, tiles, **extra):
    return eager.attend(query, key, value, regridded(tiles, lengths=None), **extra)


def top_left_causality(query, key, value, tiles, **extra):
    """The first query stands at the first key."""
    grid, more = tiles.grid, tiles.grid.num_keys - tiles.grid.num_queries
    if more <= 0 or not grid.causal or not tiles.is_everything or not grid.num_queries:
        return eager.attend(query, key, value, tiles, **extra)
    cut = Tiles(grid=replace(grid, num_keys=grid.num_queries))
    return eager.attend(query, key[:, :-more], value[:, :-more], cut, **extra)


def nan_where_nothing_is_kept(query, key, value, tiles, *, return_lse=False, **extra):
    output, lse = eager.attend(query, key, value, tiles, return_lse=True, **extra)
    output = output.masked_fill(lse.isneginf().unsqueeze(-1), torch.nan)
    return (output, lse) if return_lse else output


def mean_where_nothing_is_kept(query, key, value, tiles, *, return_lse=False, **extra):
    output, lse = eager.attend(query, key, value, tiles, return_lse=True, **extra)
    output = torch.where(lse.isneginf().unsqueeze(-1), torch.ones_like(output), output)
    return (output, lse) if return_lse else output


def lse_without_scale(query, key, value, tiles, *, scale, return_lse=False, **extra):
    output = eager.attend(query, key, value, tiles, scale=scale, **extra)
    lse = eager.attend(query, key, value, tiles, scale=1.0, return_lse=True, **extra)[1]
    return (output, lse) if return_lse else output


def detached_keys(query, key, value, tiles, **extra):
    """The forward pass is right and the gradient of the keys is missing."""
    return eager.attend(query, key.detach(), value, tiles, **extra)


def half_precision(query, key, value, tiles, *, return_lse=False, **extra):
    """Computed in bfloat16 whatever was given."""
    narrow = [tensor.bfloat16() for tensor in (query, key, value)]
    output, lse = eager.attend(*narrow, tiles, return_lse=True, **extra)
    return (output.to(query.dtype), lse.to(query.dtype)) if return_lse else output.to(query.dtype)


MUTANTS = [off_by_one, forgotten_causality, forgotten_element_mask, forgotten_tiles, forgotten_partial_tiles, unscaled,
           forgotten_window, forgotten_softcap,
           swapped_groups, dropped_padding, top_left_causality, nan_where_nothing_is_kept, mean_where_nothing_is_kept,
           lse_without_scale, detached_keys, half_precision]


def rejected(attend, dtype: torch.dtype) -> list[str]:
    """The cases whose comparison fails."""
    failed = []
    for case in CASES:
        try:
            check_attend(attend, case, dtype)
        except AssertionError:
            failed.append(case.name)
    return failed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_wrong_kernel_is_rejected(mutant, dtype):
    assert rejected(mutant, dtype)


@pytest.mark.parametrize("kernel", [reference.attend, eager.attend], ids=["reference", "eager"])
def test_a_right_kernel_is_not(kernel):
    assert rejected(kernel, torch.float32) == []


# Rules


def check_top_k(rule: type[Rule]) -> None:
    """TopK against its definition, one query at a time, with ties, forbidden and forced candidates."""
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, -torch.inf, 1.0, 1.0]])
    forced = torch.tensor([[True, False, False, False], [False, False, False, True], [False, True, False, True]])
    selection = rule(2)(scores, forced=forced)
    for q, row in enumerate(scores.tolist()):
        permitted = [c for c, score in enumerate(row) if score > -torch.inf]
        best = sorted(permitted, key=lambda c: (not forced[q, c], -row[c], c))[:2]
        assert selection.ids[q].tolist() == sorted(best)
        assert selection.permitted[q] == len(permitted)


def check_mass(rule: type[Rule]) -> None:
    """Mass keeps enough, and the least of what it keeps was needed."""
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log().repeat(3, 1)
    forced = torch.tensor([[False] * 4, [False, False, False, True], [False] * 4])
    scores[2, 0] = -torch.inf
    assert [ids.tolist() for ids in rule(0.6)(scores, forced=forced).ids] == [[0, 1, -1], [0, 1, 3], [1, 2, -1]]


class TiesToTheHigher(TopK):
    def keep(self, scores, permitted, forced):
        return super().keep(scores.flip(-1), permitted.flip(-1), forced.flip(-1)).flip(-1)


class WithoutForced(TopK):
    def keep(self, scores, permitted, forced):
        return super().keep(scores, permitted, torch.zeros_like(forced))


class ForcedOnTop(TopK):
    def keep(self, scores, permitted, forced):
        return super().keep(scores, permitted, torch.zeros_like(forced)) | forced


class OneMore(TopK):
    def keep(self, scores, permitted, forced):
        return TopK(self.k + 1).keep(scores, permitted, forced)


class Lowest(TopK):
    def keep(self, scores, permitted, forced):
        return super().keep(-scores, permitted, forced)


class KeepsForbidden(TopK):
    def __call__(self, scores, *, forced=None, unit=1):
        finite = torch.nan_to_num(scores, neginf=10.0)
        return super().__call__(finite, forced=forced, unit=unit)


class MassTooLittle(Mass):
    def keep(self, scores, permitted, forced):
        return Mass(self.mass / 2).keep(scores, permitted, forced)


class MassWithoutForced(Mass):
    def keep(self, scores, permitted, forced):
        return super().keep(scores, permitted, torch.zeros_like(forced))


class MassOfForbidden(Mass):
    """Shares of the whole row, the forbidden included."""

    def keep(self, scores, permitted, forced):
        return super().keep(torch.nan_to_num(scores, neginf=-0.9), permitted, forced)


@pytest.mark.parametrize("mutant", [TiesToTheHigher, WithoutForced, ForcedOnTop, OneMore, Lowest, KeepsForbidden],
                         ids=lambda mutant: mutant.__name__)
def test_a_wrong_top_k_is_rejected(mutant):
    with pytest.raises(AssertionError):
        check_top_k(mutant)


@pytest.mark.parametrize("mutant", [MassTooLittle, MassWithoutForced, MassOfForbidden],
                         ids=lambda mutant: mutant.__name__)
def test_a_wrong_mass_is_rejected(mutant):
    with pytest.raises(AssertionError):
        check_mass(mutant)


def test_the_right_rules_are_not():
    check_top_k(TopK)
    check_mass(Mass)


# The definition


def check_definition(function) -> None:
    """The loop against a dense sum; a query that keeps nothing gives 0."""
    keep = torch.tensor([[True, False, True], [False, False, False]])
    selection = Selection.from_mask(keep, torch.ones_like(keep)).weigh(torch.tensor([[2.0, 9.0, 3.0], [9.0, 9.0, 9.0]]))
    values = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]])
    torch.testing.assert_close(function(selection, values), torch.tensor([[2.0, 3.0], [0.0, 0.0]]))


def unweighed(selection, values):
    return apply(replace(selection, weights=torch.ones_like(selection.weights)), values)


def last_for_empty(selection, values):
    """An empty slot's -1 reads the last row."""
    return (torch.where(selection.ids < 0, 1.0, selection.weights)[..., None] * values[selection.ids]).sum(-2)


@pytest.mark.parametrize("mutant", [unweighed, last_for_empty], ids=lambda mutant: mutant.__name__)
def test_a_wrong_definition_is_rejected(mutant):
    check_definition(apply)
    with pytest.raises(AssertionError):
        check_definition(mutant)
