"""Is attention over the k best keys faster than what one would write, and than attention over all of them?

The document's own comparison, 2 x 8 heads x 64, k = 32, at lengths around the one where each method wins. Peers: the
document's scatter version (scores, topk, scatter, softmax, product with V; the faster of its two forms, and head by
head where all its matrices would not fit), torch's dense attention over every key, and x-transformers' `Attend` with
`sparse_topk`, if it is installed. Both run in turn; a ratio is the median over neighbouring pairs, peer ÷ ours. Before
a case is timed its output is compared with that of the scatter version; on a difference there is no ratio, but an
error. No gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec

import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.topk import attend_topk
from sentei.measurement.latency import LEAST, interleave, measured

K = 32
# Scores the scatter version may hold at once: it keeps about three matrices of them, 3 GB in fp32.
SCORES_AT_ONCE = 1 << 28
# Outputs are sums of 32 products of unit normals; where two scores differ by their rounding either may be kept.
TOLERANCE, MAY_DIFFER = 1e-4, 1e-4


@dataclass(frozen=True)
class Case:
    """One length of the document's comparison."""

    tokens: int
    causal: bool

    def __str__(self) -> str:
        return f"k = {K}, 2 x 8 x 64, {self.tokens:,} tokens, float32, {'causal' if self.causal else 'bidirectional'}"

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Query, key and value [2, T, 8, 64]."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(2, self.tokens, 8, 64, generator=generator) for _ in range(3)]

    @cached_property
    def forbidden(self) -> torch.Tensor | None:
        """Bool [T, T], made once: the mask is part of nobody's time."""
        return torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1) if self.causal else None

    def ours(self) -> torch.Tensor:
        """sentei's kernel."""
        return attend_topk(*self.tensors, K, causal=self.causal, impl="fused_cpp")[0]

    def heads(self) -> list[torch.Tensor]:
        """The tensors as [2, 8, T, 64]."""
        return [tensor.transpose(1, 2) for tensor in self.tensors]


def scatter(case: Case, weights: bool) -> torch.Tensor:
    """The document's version: with `weights` it scatters those, as it stands there; else scores, before a softmax."""
    query, key, value = (tensor.flatten(0, 1) for tensor in case.heads())
    size = max(1, SCORES_AT_ONCE // case.tokens**2)
    parts = [_scatter(*(tensor[i:i + size] for tensor in (query, key, value)), case.forbidden, weights)
             for i in range(0, len(query), size)]
    return torch.cat(parts).unflatten(0, (2, 8)).transpose(1, 2)


def _scatter(query, key, value, forbidden, weights):
    scores = (query @ key.transpose(-1, -2)).mul_(query.shape[-1] ** -0.5)
    if forbidden is not None:
        scores.masked_fill_(forbidden, -torch.inf)
    best, ids = scores.topk(K, dim=-1, sorted=False)
    if weights:
        return torch.zeros_like(scores).scatter_(-1, ids, best.softmax(-1)) @ value
    return torch.full_like(scores, -torch.inf).scatter_(-1, ids, best).softmax(-1) @ value


def sdpa(case: Case) -> torch.Tensor:
    """torch's dense kernel, which keeps every key."""
    return scaled_dot_product_attention(*case.heads(), is_causal=case.causal).transpose(1, 2)


def x_transformers(case: Case) -> Callable[[], torch.Tensor]:
    """The call of the peer's own top-k attention."""
    from x_transformers.attend import Attend

    attend = Attend(causal=case.causal, sparse_topk=K, heads=8)
    return lambda: attend(*case.heads())[0].transpose(1, 2)


CASES = {str(tokens): [Case(tokens, causal) for causal in (False, True)]
         for tokens in (256, 512, 1024, 2048, 4096, 8192, 16384)}


def peers(case: Case, absent: Callable[[str], None]) -> Iterator[tuple[str, Callable[[], torch.Tensor], bool]]:
    """What else a user could call: its name, the call, and whether it computes the same numbers."""
    by_head = " (head by head)" if case.tokens**2 * 16 > SCORES_AT_ONCE else ""
    yield f"scatter of weights{by_head}", partial(scatter, case, True), True
    yield f"scatter of scores{by_head}", partial(scatter, case, False), True
    yield "torch sdpa", partial(sdpa, case), False
    if find_spec("x_transformers") is None:
        absent("x-transformers is not installed")
    elif by_head:
        absent(f"x-transformers at {case.tokens:,} tokens: its matrices take {case.tokens**2 * 64 / 1e9:.0f} GB each")
    else:
        yield "x-transformers sparse_topk", x_transformers(case), True


@torch.no_grad()
def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case and peer: the keys of `sentei.benches.table`.

    Args:
        names: of CASES, numbers of tokens.
        runs: timed pairs a row, or more until they took `LEAST` seconds.
        absent: told why a peer that cannot run here has no row.
    Raises:
        AssertionError: more than the share MAY_DIFFER of the outputs differ by more than TOLERANCE.
    """
    for case in (case for name in names for case in CASES[name]):
        for peer, call, same in peers(case, absent):
            if same:
                differ = (case.ours() - call()).abs().gt(TOLERANCE).float().mean().item()
                if differ > MAY_DIFFER:
                    raise AssertionError(f"{case}, {peer}: {100 * differ:.3g} % of the outputs differ")
            yield measured("topk", str(case), peer, interleave(call, case.ours, runs=runs, least=LEAST))
