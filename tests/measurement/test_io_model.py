"""The IO model against sums done by hand, and against a cache that counts what a loop loads."""

from collections import OrderedDict

import pytest

from sentei.measurement.io_model import Attention, cache_sizes


def test_by_hand():
    """8 tokens of 2 numbers of 4 bytes, blocks of 4: a tensor has 64 bytes, a score matrix 256."""
    causal, whole = (Attention(tokens=8, width=2, query_block=4, causal=flag) for flag in (True, False))
    assert causal.compulsory() == 256
    assert (causal.standard(511), causal.standard(512)) == (256 + 1024, 256)
    assert (whole.tiled(255), whole.tiled(256)) == (128 + 2 * 128, 256)
    assert causal.tiled(0) == 128 + 64 + 128
    assert causal.largest_block(320) == 10


def counted(problem: Attention, cache: int) -> int:
    """Bytes loaded and stored by the tiled loop through a cache that drops the row used longest ago."""
    line, held, moved = problem.width * problem.element, OrderedDict(), 0
    for first in range(0, problem.tokens, problem.query_block):
        last = min(first + problem.query_block, problem.tokens)
        rows = [("query", i) for i in range(first, last)]
        for j in range(last if problem.causal else problem.tokens):
            for row in [*rows, ("key", j), ("value", j), *(("output", i) for _, i in rows)]:
                if row not in held:
                    moved += line if row[0] != "output" else 0
                held[row] = None
                held.move_to_end(row)
                while len(held) * line > cache:
                    held.popitem(last=False)
        moved += (last - first) * line  # the output, once it is done
    return moved


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("tokens, block", [(48, 8), (50, 8), (13, 13), (40, 4)])
def test_a_cache_that_counts_loads_as_much(tokens, block, causal):
    problem = Attention(tokens=tokens, width=4, query_block=block, causal=causal)
    line = 4 * 4
    roomy, tight = (2 * tokens + 4 * block) * line, (2 * block + 4) * line
    assert counted(problem, roomy) == problem.tiled(roomy) == problem.compulsory()
    assert counted(problem, tight) == problem.tiled(tight)
    assert problem.tiled(tight) > problem.compulsory() or block >= tokens


def test_a_larger_block_moves_less_and_the_paper_s_law_holds():
    """Twice the cache, half the bytes, as long as keys and values do not fit."""
    def moved(cache: int) -> int:
        whole = Attention(tokens=1 << 16, width=64, causal=False)
        return Attention(tokens=1 << 16, width=64, causal=False, query_block=whole.largest_block(cache)).tiled(cache)

    assert 1.9 < moved(1 << 17) / moved(1 << 18) < 2.1


def test_cache_sizes_are_read_and_unknown_ones_are_left_out(tmp_path):
    for number, (level, kind, size) in enumerate([("1", "Data", "32K"), ("1", "Instruction", "64K"),
                                                  ("3", "Unified", "16M")]):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert cache_sizes(tmp_path) == {"L1": 32 << 10, "L3": 16 << 20}
    assert cache_sizes(tmp_path / "nowhere") == {}
