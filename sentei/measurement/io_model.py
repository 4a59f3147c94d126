"""Bytes that attention moves between a cache and what lies behind it: the IO model of FlashAttention (Dao 2022).

Standard attention writes and reads whole score matrices, Θ(N d + N²); tiled attention keeps a block of queries and
reads keys and values once for each, Θ(N² d / block), which for the largest block that M bytes hold is Θ(N² d² / M).
Paper: arXiv 2205.14135, theorem 2. Pure arithmetic; one head, whose rows are all `width` wide.
"""

from dataclasses import dataclass
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One head's forward.

    Args:
        tokens: N, queries and keys alike.
        width: d.
        query_block: rows the tiled loop works on at once.
        causal: half of the pairs; tiles on the diagonal count whole.
        element: bytes of a number.
    """

    tokens: int
    width: int
    query_block: int = 64
    causal: bool = True
    element: int = 4

    def compulsory(self) -> int:
        """Query, key and value read once, output written once: what no cache saves."""
        return 4 * self.tokens * self.width * self.element

    def standard(self, cache: int) -> int:
        """Bytes past `cache` bytes of Q Kᵀ, softmax and P V one after another, as in the paper's algorithm 0.

        S is written, read, and written again as P, which is read; where all N² fit, they stay. No pair is left out
        for causality: the matrices are whole.
        """
        square = self.tokens ** 2 * self.element
        inside = square + self.compulsory() <= cache
        return self.compulsory() + (0 if inside else 4 * square)

    def tiled(self, cache: int) -> int:
        """Bytes past `cache` bytes of the loop over query blocks that reads its keys and values for each.

        Where keys and values fit whole beside queries and output of this block and of the one before, which a cache
        that drops what was used longest ago still holds, they are read once.
        """
        line = self.width * self.element
        if (2 * self.tokens + 4 * self.query_block) * line <= cache:
            return self.compulsory()
        return 2 * self.tokens * line + 2 * line * sum(
            min(first + self.query_block, self.tokens) if self.causal else self.tokens
            for first in range(0, self.tokens, self.query_block))

    def largest_block(self, cache: int) -> int:
        """The paper's block: a quarter of the rows that `cache` bytes hold, at least one."""
        return max(cache // (4 * self.width * self.element), 1)


def cache_sizes(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of each data cache of the first core, by level ("L1", …); empty where the system does not say."""
    found = {}
    for index in sorted(folder.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind in ("Data", "Unified"):
            found[f"L{level}"] = int(size[:-1]) * UNITS[size[-1]] if size[-1] in UNITS else int(size)
    return found
