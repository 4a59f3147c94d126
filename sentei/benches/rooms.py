"""Do the rooms keep their word: experts and Soft MoE against their peers, depth and heads against their share, LoRA?

One file a room measures; here their cases stand side by side. What a row is, and who its peer is, tell the files:
`experts`, `mixture`, `soft`, `depth`, `heads` and `lora`.
"""

from collections.abc import Callable, Iterator

from sentei.benches import depth, experts, heads, lora, mixture, soft

PARTS = (experts, mixture, soft, depth, heads, lora)
CASES = {name: cases for part in PARTS for name, cases in part.CASES.items()}


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """The rows of the named cases, room by room: the keys of `sentei.benches.table`, and what a room adds.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: told why a peer that cannot run here has no row.
    Raises:
        AssertionError: ours and a peer's outputs differ; there is no ratio then.
    """
    for part in PARTS:
        yield from part.rows([name for name in names if name in part.CASES], runs, absent)
