"""Attention written a second time, with a boolean mask, and the one comparison every attention kernel must pass."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from sentei.kernels.attention import Grid, Tiles


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `attend`: sizes, what is permitted and what is kept.

    Args:
        lengths: (start, stop) of the real keys, one a row; its number is the batch. None: one row without padding.
        choices: heads that choose for themselves, H or G.
        kept: chance of a tile to be kept; None is the dense plan.
        logits: standard deviation of the scaled scores.
        window, softcap: as in Grid and attend; 0 for none.
        widths: of queries and values; 6 and 5, so that no two sizes are mixed up unseen.
    """

    name: str
    queries: int
    keys: int
    tile: tuple[int, int]
    heads: int = 2
    groups: int = 2
    choices: int | None = None
    causal: bool = True
    lengths: tuple[tuple[int, int], ...] | None = None
    kept: float | None = 0.5
    logits: float = 1.0
    window: int = 0
    softcap: float = 0.0
    widths: tuple[int, int] = (6, 5)

    @property
    def batch(self) -> int:
        return 1 if self.lengths is None else len(self.lengths)

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """Query, key and value."""
        generator = torch.Generator().manual_seed(7)
        width, value_width = self.widths
        shapes = ((self.queries, self.heads, width), (self.keys, self.groups, width),
                  (self.keys, self.groups, value_width))
        tensors = [torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        tensors[0] *= self.logits
        return [tensor.to(dtype) for tensor in tensors]

    def grid(self) -> Grid:
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        return Grid(num_queries=self.queries, num_keys=self.keys, query_block=self.tile[0], key_block=self.tile[1],
                    causal=self.causal, window=self.window or None, lengths=lengths)

    def keep(self) -> torch.Tensor:
        """Bool [B, H or G, QB, KB]: the tiles drawn, permitted or not."""
        blocks = -(-self.queries // self.tile[0]), -(-self.keys // self.tile[1])
        draw = torch.rand(self.batch, self.choices or self.heads, *blocks, generator=torch.Generator().manual_seed(8))
        return draw < (1 if self.kept is None else self.kept)

    def tiles(self) -> Tiles:
        return Tiles(grid=self.grid()) if self.kept is None else Tiles.from_mask(self.keep(), self.grid())

    def pairs(self) -> torch.Tensor:
        """Bool [B, H, Tq, Tk]: the pairs that count, from the definitions and not from the grid."""
        keep = self.keep().repeat_interleave(self.heads // (self.choices or self.heads), 1)
        keep = keep.repeat_interleave(self.tile[0], 2).repeat_interleave(self.tile[1], 3)
        keep = keep[:, :, :self.queries, :self.keys].clone()
        for b in range(self.batch):
            start, stop = (0, self.keys) if self.lengths is None else self.lengths[b]
            for i in range(self.queries):
                last = i + self.keys - self.queries if self.causal else self.keys
                for j in range(self.keys):
                    seen = j <= last and not (self.window and j <= last - self.window)
                    keep[b, :, i, j] &= start <= j < stop and seen
        return keep


CASES = [
    Case(name="causal", queries=12, keys=12, tile=(4, 3)),
    Case(name="bidirectional", queries=12, keys=12, tile=(4, 3), causal=False),
    Case(name="dense", queries=12, keys=12, tile=(4, 3), kept=None),
    Case(name="dense bidirectional", queries=12, keys=9, tile=(4, 3), kept=None, causal=False),
    Case(name="dense cross", queries=5, keys=12, tile=(4, 3), kept=None),
    Case(name="dense padded", queries=6, keys=6, tile=(4, 3), kept=None, lengths=((2, 6), (0, 6), (0, 4))),
    Case(name="every tile by name", queries=10, keys=10, tile=(4, 3), kept=1.0),
    Case(name="more keys than queries", queries=5, keys=13, tile=(2, 4)),
    Case(name="one query", queries=1, keys=11, tile=(4, 4)),
    Case(name="one query dense", queries=1, keys=11, tile=(4, 4), kept=None),
    Case(name="one query, cut by padding", queries=1, keys=11, tile=(4, 4), lengths=((3, 11), (0, 11))),
    Case(name="ragged tails", queries=11, keys=14, tile=(4, 5)),
    Case(name="ragged bidirectional", queries=11, keys=14, tile=(4, 5), causal=False),
    Case(name="a tile larger than the text", queries=3, keys=3, tile=(16, 8), kept=1.0),
    Case(name="padding left", queries=9, keys=9, tile=(4, 2), lengths=((3, 9), (0, 9), (5, 9))),
    Case(name="padding right", queries=9, keys=9, tile=(4, 2), lengths=((0, 9), (0, 4), (0, 7))),
    Case(name="padding both, grouped", queries=9, keys=11, tile=(4, 2), heads=4, lengths=((2, 7), (0, 11)), choices=2),
    Case(name="padding bidirectional", queries=9, keys=9, tile=(4, 2), lengths=((3, 9), (0, 6)), causal=False),
    Case(name="a row of padding alone", queries=6, keys=6, tile=(2, 2), lengths=((3, 3), (0, 6)), kept=1.0),
    Case(name="a row of padding alone, dense", queries=6, keys=6, tile=(2, 2), lengths=((6, 6), (0, 6)), kept=None),
    Case(name="grouped 3 to 1", queries=10, keys=10, tile=(4, 3), heads=6, groups=2),
    Case(name="grouped dense", queries=10, keys=10, tile=(4, 3), heads=6, groups=2, kept=None),
    Case(name="one choice a group", queries=10, keys=10, tile=(4, 3), heads=6, groups=2, choices=2),
    Case(name="multi-query", queries=10, keys=10, tile=(4, 3), heads=4, groups=1),
    Case(name="multi-query, one choice", queries=10, keys=10, tile=(4, 3), heads=4, groups=1, choices=1),
    Case(name="token by token", queries=9, keys=9, tile=(1, 1)),
    Case(name="token by token, cross", queries=3, keys=9, tile=(1, 1), causal=False),
    Case(name="some queries keep nothing", queries=12, keys=12, tile=(2, 2), kept=0.15),
    Case(name="nothing kept", queries=8, keys=8, tile=(4, 4), kept=0.0),
    Case(name="huge logits", queries=12, keys=12, tile=(4, 3), logits=1e4),
    Case(name="queries before the first key", queries=9, keys=5, tile=(2, 2), kept=1.0),
    Case(name="window", queries=12, keys=12, tile=(4, 3), window=5),
    Case(name="window of one", queries=9, keys=9, tile=(2, 3), window=1, kept=1.0),
    Case(name="window, dense", queries=12, keys=12, tile=(4, 3), window=7, kept=None),
    Case(name="window, more keys, padded, grouped", queries=7, keys=15, tile=(3, 2), window=4, heads=4, kept=0.7,
         lengths=((0, 15), (3, 12), (9, 15))),
    Case(name="window beyond the text", queries=6, keys=6, tile=(2, 2), window=100),
    Case(name="soft cap", queries=12, keys=12, tile=(4, 3), softcap=1.5, logits=3.0),
    Case(name="soft cap, dense, padded", queries=9, keys=9, tile=(4, 2), softcap=2.0, kept=None,
         lengths=((3, 9), (0, 9))),
    Case(name="soft cap, huge logits", queries=10, keys=10, tile=(4, 3), softcap=30.0, logits=300.0),
    Case(name="no query", queries=0, keys=6, tile=(2, 2)),
    Case(name="no query, dense", queries=0, keys=6, tile=(2, 2), kept=None),
]


@st.composite
def drawn_cases(draw) -> Case:
    keys, groups = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    causal, kept = draw(st.booleans()), draw(st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]))
    span = st.tuples(st.integers(0, keys), st.integers(0, keys)).map(sorted).map(tuple)
    return Case(name="drawn", queries=draw(st.integers(0, 9)), keys=keys, groups=groups,
                heads=groups * draw(st.integers(1, 3)), choices=draw(st.sampled_from([None, groups])),
                tile=(draw(st.integers(1, 5)), draw(st.integers(1, 5))), causal=causal, kept=kept,
                lengths=draw(st.none() | st.lists(span, min_size=1, max_size=3).map(tuple)),
                window=draw(st.integers(0, 6)) if causal else 0, softcap=draw(st.sampled_from([0.0, 0.0, 0.8])))


def masked_attention(query, key, value, pairs, scale, softcap=0.0):
    """Every score, then the mask: output [B, Tq, H, Dv] and lse [B, Tq, H]; softmax in fp32 or wider."""
    per_group = query.shape[2] // key.shape[2]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    key, value = key.repeat_interleave(per_group, 1), value.repeat_interleave(per_group, 1)
    scores = query @ key.transpose(-1, -2) * scale
    scores = (softcap * torch.tanh(scores / softcap) if softcap else scores).masked_fill(~pairs, -torch.inf)
    some = pairs.any(-1, keepdim=True)
    safe = torch.where(some, scores, torch.zeros_like(scores))
    shares = safe.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    output = torch.where(some, shares, torch.zeros_like(shares)) @ value
    lse = torch.where(some[..., 0], safe.logsumexp(-1), -torch.inf)
    return output.transpose(1, 2), lse.transpose(1, 2)


def outcome(attend, tensors) -> list[torch.Tensor]:
    """Output, finite lse, and the gradients of one fixed loss of both; `attend(q, k, v)` returns output and lse."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output, lse = attend(*leaves)
    assert output.dtype == tensors[0].dtype, f"output is {output.dtype}"
    assert not lse.isnan().any() and not lse.isposinf().any(), "NaN or +inf in the lse"
    finite = lse.masked_fill(lse.isneginf(), 0)
    generator = torch.Generator().manual_seed(9)
    loss = sum((part * torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)).sum()
               for part in (output, finite)) + sum(leaf.sum() * 0 for leaf in leaves)
    gradients = torch.autograd.grad(loss, leaves)
    return [output.detach(), lse.detach(), *gradients]


def check_attend(attend, case: Case, dtype: torch.dtype = torch.float64, steps: int = 1) -> None:
    """Raises AssertionError unless `attend` computes the case, gradients included.

    Its error against fp64 may be twice that of plain masked attention in the same dtype, and some rounding steps.
    """
    tensors, pairs, scale = case.tensors(dtype), case.pairs(), case.widths[0] ** -0.5
    extra = {"softcap": case.softcap} if case.softcap else {}
    exact = outcome(lambda *qkv: masked_attention(*qkv, pairs, scale, **extra), [tensor.double() for tensor in tensors])
    plain = outcome(lambda *qkv: masked_attention(*qkv, pairs, scale, **extra), tensors)
    got = outcome(lambda *qkv: attend(*qkv, case.tiles(), scale=scale, **extra, return_lse=True), tensors)
    alone = attend(*tensors, case.tiles(), scale=scale, **extra)
    for name, value, other, true in zip(("output", "lse", "dq", "dk", "dv", "output without lse"),
                                        (*got, alone), (*plain, plain[0]), (*exact, exact[0]), strict=True):
        assert value.shape == true.shape, f"{name}: {list(value.shape)} instead of {list(true.shape)}"
        if not value.numel():
            continue
        assert torch.equal(value.isneginf(), true.isneginf()), f"{name}: -inf in the wrong places"
        finite = ~true.isneginf()
        true = true.masked_fill(~finite, 0)
        error, allowed = ((x.double().masked_fill(~finite, 0) - true).abs().amax() for x in (value, other))
        step = torch.finfo(dtype).eps * true.abs().amax().clamp(min=1) * (16 if dtype == torch.float64 else steps)
        assert error <= 2 * allowed + step, f"{name}: error {error:.3g}, plain attention {allowed:.3g} + {step:.3g}"
    empty = ~pairs.any(-1).transpose(1, 2)
    assert (got[0][empty] == 0).all() and got[1][empty].isneginf().all(), "a query without keys must give 0 and -inf"
