"""FlexAttention as an executor of our plan: on the CPU, forward only. Compiling a shape takes seconds: most is slow."""

import pytest
import torch
from oracle import CASES, Case, masked_attention

from sentei.core.errors import ImplError
from sentei.kernels.attention import Tiles, attend, choose_impl, flex

PADDED = Case(name="padded, after a cache", queries=40, keys=60, tile=(16, 32), heads=4, groups=2, choices=2,
              lengths=((10, 60), (0, 21), (60, 60)), widths=(16, 8))
WINDOWED = Case(name="window, soft cap, padded, after a cache", queries=40, keys=70, tile=(16, 16), heads=4, groups=2,
                choices=2, window=21, softcap=1.5, logits=3.0, kept=0.4, lengths=((10, 70), (0, 41)), widths=(16, 8))
OTHERS = [
    Case(name="window of one", queries=40, keys=40, tile=(16, 32), window=1, kept=0.6, widths=(16, 16)),
    Case(name="window, dense", queries=40, keys=40, tile=(16, 16), window=18, kept=None, widths=(16, 16)),
    Case(name="soft cap", queries=40, keys=40, tile=(16, 16), softcap=30.0, logits=30.0, widths=(16, 16)),
    Case(name="causal", queries=70, keys=70, tile=(32, 32), heads=4, groups=2, widths=(16, 16)),
    Case(name="bidirectional", queries=50, keys=40, tile=(16, 16), kept=0.2, causal=False, widths=(32, 16)),
    Case(name="padded bidirectional", queries=30, keys=40, tile=(16, 16), causal=False, lengths=((5, 40), (0, 9)),
         widths=(16, 16)),
    Case(name="dense", queries=40, keys=40, tile=(32, 32), kept=None, widths=(16, 16)),
    Case(name="blocks of no power of two", queries=40, keys=40, tile=(24, 20), widths=(16, 16)),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Torch compiles a function for some shapes only, before it refuses."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(case: Case, dtype: torch.dtype) -> None:
    """The output is as near to fp64 as masked attention in the same dtype; a row without keys gives 0."""
    tensors, pairs = case.tensors(dtype), case.pairs()
    exact, plain = (masked_attention(*(tensor.to(kind) for tensor in tensors), pairs, 0.3, case.softcap)[0]
                    for kind in (torch.float64, dtype))
    output = attend(*tensors, case.tiles(), scale=0.3, softcap=case.softcap, impl="flex")
    assert output.dtype == dtype and (output[~pairs.any(-1).transpose(1, 2)] == 0).all()
    step = 4 * torch.finfo(dtype).eps * exact.abs().amax().clamp(min=1)
    assert (output - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + step


@pytest.mark.parametrize("case", [PADDED, WINDOWED], ids=lambda case: case.name)
def test_it_computes_the_plan(case):
    assert (~case.pairs().any(-1)).any()
    check(case, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_it_computes_other_plans(case, dtype):
    check(case, dtype)


@pytest.mark.slow
def test_it_never_goes_on_without_compiling(monkeypatch):
    """Uncompiled, FlexAttention does not look at the tiles: the numbers would be wrong."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    check(OTHERS[3], torch.float32)
    with pytest.raises(ImplError, match="one more than torch's limit of 1"):
        check(OTHERS[4], torch.float32)


@pytest.mark.parametrize("case", CASES + [PADDED, WINDOWED, *OTHERS], ids=lambda case: case.name)
def test_the_rows_that_see_a_key_are_those_of_the_case(case):
    tiles = case.tiles().listed(case.batch, case.groups, torch.device("cpu"))
    assert torch.equal(flex._seen(tiles, case.heads), case.pairs().any(-1))


@pytest.mark.parametrize("case", [PADDED, WINDOWED, *OTHERS], ids=lambda case: case.name)
def test_its_lists_and_its_question_are_those_of_the_plan(case):
    """The BlockMask, read as FlexAttention reads it, permits the pairs of the case."""
    tiles = case.tiles().listed(case.batch, case.groups, torch.device("cpu"))
    mask = flex.block_mask(tiles, case.heads)
    rows, columns = torch.arange(case.queries)[:, None], torch.arange(case.keys)
    found = torch.zeros_like(case.pairs())
    for b in range(case.batch):
        asked = mask.mask_mod(torch.tensor(b), 0, rows, columns)
        for h in range(case.heads):
            for counts, ids, cut in ((mask.kv_num_blocks, mask.kv_indices, True),
                                     (mask.full_kv_num_blocks, mask.full_kv_indices, False)):
                for block, count in enumerate(counts[b, h].tolist()):
                    for name in ids[b, h, block, :count].tolist():
                        tile = (rows // case.tile[0] == block) & (columns // case.tile[1] == name)
                        found[b, h] |= tile & asked if cut else tile
    assert torch.equal(found, case.pairs())


def test_what_the_cpu_does_not_have_is_refused():
    case = OTHERS[0]
    query, key, value = case.tensors(torch.float32)
    with pytest.raises(ImplError, match="flex: .*got tensors that want gradients, on the CPU"):
        attend(query.requires_grad_(), key, value, case.tiles(), impl="flex")
    with pytest.raises(ImplError, match="flex: .*got a call for the lse on the CPU"):
        attend(query.detach(), key, value, case.tiles(), impl="flex", return_lse=True)
    with pytest.raises(ImplError, match="flex: .*got torch.float64 on cpu"):
        attend(*case.tensors(), case.tiles(), impl="flex")
    with pytest.raises(ImplError, match="flex: .*got tensors without elements"):
        attend(query.detach()[:0], key[:0], value[:0], Tiles(grid=case.grid()), impl="flex")


def test_auto_never_takes_it(monkeypatch):
    case = OTHERS[0]
    for tiles in (case.tiles(), Tiles(grid=case.grid())):
        assert choose_impl("auto", *case.tensors(torch.float32), tiles)[0] != "flex"
