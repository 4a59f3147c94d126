"""Routing through a `Stack`: what tests draw, and how near to fp64 an implementation has to be."""

from dataclasses import replace

import torch

from sentei.kernels.routing import Stack, fused_cpp, route

SIZES = {"tokens": 20, "slots": 2, "experts": 4, "inner": 9, "width": 8, "outputs": 7}


def drawn(*sizes: int, gated=True, activation="silu", dtype=torch.float32, seed=0, joint=False, **named: int):
    """Leaves that want gradients (hidden, weights, up, down, gate), ids with empty slots, and who makes the stack.

    Args:
        sizes, named: others than SIZES, in that order or by name.
    """
    tokens, slots, experts, inner, width, outputs = (SIZES | dict(zip(SIZES, sizes, strict=False)) | named).values()
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, size: float = 1.0) -> torch.Tensor:
        wide = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return wide.to(dtype).requires_grad_()

    hidden, weights, down = leaf(tokens, width), leaf(tokens, slots), leaf(experts, outputs, inner, size=0.5)
    ids = torch.randint(-1, experts, (tokens, slots), generator=generator)
    if joint:
        first = leaf(experts, 2 * inner, width, size=0.5)
        return (hidden, weights, first, down), ids, lambda: Stack.from_joint(first, down, activation)
    up, gate = leaf(experts, inner, width, size=0.5), leaf(experts, inner, width, size=0.5) if gated else None
    leaves = (hidden, weights, up, down) + ((gate,) if gated else ())
    return leaves, ids, lambda: Stack(up=up, down=down, gate=gate, activation=activation)


def results(leaves, ids, stack, impl: str, seeds: torch.Tensor) -> list[torch.Tensor]:
    """The output, without and with gradients, and the gradients of its product with `seeds`."""
    with torch.no_grad():
        bare = route(leaves[0], ids, leaves[1], stack(), impl=impl)
    y = route(leaves[0], ids, leaves[1], stack(), impl=impl)
    found = torch.autograd.grad(y, leaves, seeds.to(y.dtype), allow_unused=True)
    return [bare, y.detach(), *(torch.zeros_like(leaf) if one is None else one
                                for one, leaf in zip(found, leaves, strict=True))]


def widened(leaves, stack: Stack):
    """The same in fp64: leaves in the order of `drawn` without a joint weight, and the stack of them."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return wide, lambda: Stack(up=wide[2], down=wide[3], gate=wide[4] if len(wide) > 4 else None,
                               activation=stack.activation)


def check(impl: str, leaves, ids, stack) -> None:
    """Errors against fp64 are at most twice those of the definition in the same dtype, or twice what roundings are.

    Those are one of the dtype, and those of sums in fp32 of numbers that may cancel: the same call of absolute numbers
    tells their size.
    """
    wide, wide_stack = widened(leaves, stack())
    seeds = torch.randn(len(ids), leaves[3].shape[1], generator=torch.Generator().manual_seed(9)).to(leaves[0].dtype)
    exact, own, found = (results(*given, seeds) for given in (
        (wide, ids, wide_stack, "reference"), (leaves, ids, stack, "reference"), (leaves, ids, stack, impl)))
    absolute = [leaf.detach().abs().requires_grad_() for leaf in leaves]
    large, large_stack = widened(absolute, replace(stack(), activation="relu"))
    bounds = results(large, ids, large_stack, "reference", seeds.abs())
    for number, (one, plain, best, bound) in enumerate(zip(found, own, exact, bounds, strict=True)):
        assert one.dtype == plain.dtype and one.shape == plain.shape
        error, allowed = ((tensor.double() - best).norm().item() for tensor in (one, plain))
        rounding = (torch.finfo(torch.float32).eps * bound.norm() + torch.finfo(plain.dtype).eps * best.norm()).item()
        assert error <= 2 * max(allowed, rounding), f"result {number}: error {error}, own {allowed}, {rounding}"


def spoil():
    """Every room that waits is full of what no answer has."""
    held = []
    for size in range(16, 21):
        for _ in range(2):
            held.append(fused_cpp._room(1 << size).fill_(float("nan")))
            held.append(fused_cpp._room((3 << size) // 2).fill_(float("nan")))
