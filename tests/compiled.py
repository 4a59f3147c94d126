"""Compiles the Triton kernels for a GPU that is not there: the interpreter runs code that the compiler refuses.

Run without TRITON_INTERPRET: python tests/compiled.py ARCHITECTURE small|usual FOLDER. One JSON line a kernel.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from sentei.kernels.attention import Grid, triton_pages, triton_tiles
from sentei.kernels.attention.tiles import Tiles
from sentei.kernels.routing import order, triton_groups
from sentei.kernels.triton_parts import Launch

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent:
    """What Triton asks a driver before it compiles; `device` is that of the arguments."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_alone(start, folder: Path):
    """A stand-in for the start of a kernel, which compiles it for the arguments and says what it takes."""
    def run(kernel, *arguments, grid, warmup, **options):
        made = start(kernel, *arguments, grid=grid, warmup=True, **options)
        file = folder / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        used = subprocess.run([TOOL, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{word}:(\d+)", used)[1]) for word in ("REG", "STACK"))
        print(json.dumps({"kernel": kernel.fn.__name__, "registers": registers, "stack": stack,
                          "shared": made.metadata.shared,
                          "tensor_cores": bool(re.search("wgmma|mma.sync", made.asm["ptx"]))}), flush=True)

    return run


def attention(dtype: torch.dtype, width: int, listed: bool, starts: list[Launch] | None, *, limited: bool) -> None:
    """Forward and backward of a padded causal text; where it is limited with a window and a soft cap."""
    query, key = (torch.empty(2, 4000, heads, width, dtype=dtype, device="cpu") for heads in (8, 2))
    grid = Grid(num_queries=4000, num_keys=4000, query_block=64, key_block=64, window=900 if limited else None,
                lengths=torch.empty(2, 2, dtype=torch.int64, device="cpu"))
    counts = torch.empty(2, 2, grid.num_query_blocks, dtype=torch.int32, device="cpu")
    plan = [counts, counts.new_empty(*counts.shape, 8)] * 2 if listed else []
    softcap = 30.0 if limited else 0.0
    starts = starts or [triton_tiles.launch(kernel, query, key) for kernel in ("forward", "query", "key")]
    output, lse, softmax = triton_tiles.forward((query, key, key), plan, grid, 0.3, softcap, starts[0])
    triton_tiles.backward((query, key, key, output, softmax, output, lse), plan, grid, 0.3, softcap, tuple(starts[1:]))


def routing(dtype: torch.dtype, width: int) -> None:
    """A product of gathered rows, one that is added to, and one of the weights' gradients, for 8 experts."""
    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="cpu")

    token = torch.arange(128, device="cpu")
    plan = triton_groups.schedule(order.Order(token[:9], token, token[:, None]))
    rows, weights = triton_groups.factor(empty(128, width), token), empty(8, 4 * width, width)
    triton_groups.rows_product(rows, weights, empty(128, 4 * width), plan)
    triton_groups.rows_product(triton_groups.factor(empty(128, 4 * width)), weights,
                               empty(128, width, kind=torch.float32), plan, turned=True, add=True)
    triton_groups.weights_product(triton_groups.factor(empty(128, 4 * width)), rows, weights, plan)


def main() -> None:
    """Compiles the small or the usual starts of every kernel."""
    triton.runtime.driver.set_active(Absent(int(sys.argv[1])))
    triton.JITFunction.run = compile_alone(triton.JITFunction.run, Path(sys.argv[3]))
    Tiles.by_key = lambda tiles: (tiles.full_count, tiles.full_ids, tiles.partial_count, tiles.partial_ids)
    if sys.argv[2] == "small":
        attention(torch.bfloat16, 16, True, [Launch(16, 16, 1, 1)] * 3, limited=False)
        attention(torch.float32, 24, False, [Launch(16, 16, 1, 1)] * 3, limited=True)
        routing(torch.bfloat16, 24)
    else:
        for width in (64, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                attention(dtype, width, True, None, limited=False)
        for limited in (False, True):
            attention(torch.bfloat16, 128, False, None, limited=limited)
        for dtype in (torch.bfloat16, torch.float32):
            attention(dtype, 256, True, None, limited=True)
        for dtype in (torch.bfloat16, torch.float32):
            routing(dtype, 512)
    query, key = (torch.empty(2, tokens, 4, 64, dtype=torch.bfloat16, device="cpu") for tokens in (1, 900))
    triton_pages.attend_pages(query, key[:, :, :2], key[:, :, :2], torch.empty(2, 2, 1, 9, dtype=torch.int32,
                              device="cpu"), page=16, scale=0.3)


if __name__ == "__main__":
    main()
