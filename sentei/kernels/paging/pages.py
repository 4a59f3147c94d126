"""What every implementation reads: the pages of keys, what a row may see of them, and how it chooses."""

from typing import NamedTuple

import torch

from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import All, Mass, Rule, Threshold, TopK
from sentei.kernels.attention.select import near
from sentei.kernels.attention.tiles import Grid

PAGE = 16
# The rules a page can be chosen by, in the order of native/rules.h, and where each has its number.
RULES = {All: None, TopK: "k", Mass: "mass", Threshold: "ratio"}


class Pages(NamedTuple):
    """The pages of one call and the choice among them. One is made for every layer of every token, hence a tuple.

    Args:
        num_queries, num_keys, causal, lengths: as in Grid.
        rule: All, TopK, Mass or Threshold, of one number.
        window: tokens before a row whose pages are always kept, as are the first page and what is seen in part.
        bounds: [B, G, N, 2, D] or None: the lowest and the highest key of each page, channel by channel, in the dtype
            of the key. N ≥ Tk // PAGE; what is said of a page that is not whole is not read. None: made when needed.
    """

    num_queries: int
    num_keys: int
    rule: Rule
    window: int
    causal: bool = True
    lengths: torch.Tensor | None = None
    bounds: torch.Tensor | None = None

    @property
    def grid(self) -> Grid:
        """One row by one page."""
        return Grid(num_queries=self.num_queries, num_keys=self.num_keys, query_block=1, key_block=PAGE,
                    causal=self.causal, lengths=self.lengths)

    @property
    def num_pages(self) -> int:
        """KB, the ragged one included."""
        return -(-self.num_keys // PAGE)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [B, G, R, KB]: what is kept by `scores` of that shape; what is forced is a part of it."""
        return self.rule(scores, forced=near(self.grid, scores.device, window=self.window), unit=PAGE).mask()

    def check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              kept: torch.Tensor | None = None) -> None:
        """Raises ShapeError or RuleError unless the tensors fit one another and these pages, and the rule is of ours.

        Also unless a choice made before is bool [B, G, R, KB], or 1 for B, G or R. The query may have another floating
        dtype than the key and the value.
        """
        if not can_choose(self.rule):
            raise RuleError("paging", expected="All, TopK, Mass or Threshold, of one number",
                            got=repr(self.rule)[:200], do="choose pages by one of these")
        if self.window < 0:
            raise RuleError("paging", expected="a window from 0", got=str(self.window), do="choose another window")
        # Not by `grid.check`, and number by number: this runs for every layer of every token.
        fits = query.dim() == key.dim() == value.dim() == 4
        if fits:
            (batch, rows, heads, width), (_, keys, groups, _) = query.shape, key.shape
            fits = (key.shape == (batch, keys, groups, width) and groups and heads % groups == 0
                    and value.shape == (batch, keys, groups, value.shape[3])
                    and self.num_queries == rows and self.num_keys == keys
                    and key.dtype == value.dtype and query.is_floating_point() and key.is_floating_point()
                    and query.device == key.device == value.device)
        if not fits:
            raise ShapeError("paging", expected=f"query [B, {self.num_queries}, H, D], key [B, {self.num_keys}, G, D], "
                             f"value [B, {self.num_keys}, G, Dv], G dividing H, of floats, key and value of one dtype, "
                             "all on one device",
                             got=", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (query, key, value)),
                             do="bring the heads to dimension 2")
        self._check_extras(key, rows, kept)

    def _check_extras(self, key: torch.Tensor, rows: int, kept: torch.Tensor | None) -> None:
        """Raises ShapeError unless lengths, bounds and a choice made before fit the key and the rows."""
        (batch, keys, groups, width), lengths, bounds = key.shape, self.lengths, self.bounds
        if lengths is not None and (lengths.shape != (batch, 2) or lengths.dtype != torch.int64
                                    or lengths.device != key.device):
            raise ShapeError("paging", expected=f"lengths int64 [{batch}, 2]", do="give one (start, stop) a row",
                             got=f"{lengths.dtype} {list(lengths.shape)} on {lengths.device}")
        if bounds is not None and not (bounds.dim() == 5 and bounds.shape == (batch, groups, bounds.shape[2], 2, width)
                                       and bounds.shape[2] >= keys // PAGE and bounds.dtype == key.dtype
                                       and bounds.device == key.device):
            raise ShapeError("paging", expected=f"bounds {key.dtype} [{batch}, {groups}, {keys // PAGE} or more, 2, "
                             f"{width}]", got=f"{bounds.dtype} {list(bounds.shape)} on {bounds.device}",
                             do="give the bounds of this key, or none")
        if kept is not None and not (
                kept.dim() == 4 and kept.dtype == torch.bool and kept.shape[3] == self.num_pages
                and kept.shape[0] in (1, batch) and kept.shape[1] in (1, groups) and kept.shape[2] in (1, rows)
                and kept.device == key.device):
            raise ShapeError("paging", expected=f"kept bool [{batch}, {groups}, {rows}, {self.num_pages}]",
                             got=f"{kept.dtype} {list(kept.shape)} on {kept.device}", do="give a choice of these pages")


def can_choose(rule: Rule) -> bool:
    """Whether pages can be chosen by the rule: All, TopK, Mass or Threshold, of one number and not one a head."""
    name = RULES.get(type(rule), "")
    return name is None or (name != "" and not isinstance(getattr(rule, name), tuple))


def bounds_of(key: torch.Tensor) -> torch.Tensor:
    """The lowest and the highest key of each whole page, channel by channel: [B, G, T // PAGE, 2, D].

    Args:
        key: [B, G, T, D], as a cache has it.
    """
    whole = key.shape[2] // PAGE
    pages = key[:, :, :whole * PAGE].unflatten(2, (whole, PAGE))
    if not whole:
        return pages.new_empty(*key.shape[:2], 0, 2, key.shape[3])
    return torch.stack([pages.amin(3), pages.amax(3)], 3)
