"""Ops of torch, `sentei::NAME`: how a kernel is put behind one, with what fake tensors make of it and its gradients;
and where those of Triton run."""

from collections.abc import Callable

import torch

from sentei.core.errors import ImplError

_OPS = torch.library.Library("sentei", "FRAGMENT")


def define(schema: str, run: Callable, shapes: Callable, devices: tuple[str, ...] = ("CPU",)) -> None:
    """Makes the op that `schema` names.

    Args:
        schema: e.g. "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor".
        run: what it does; anyone may call an op, so `run` and `shapes` check what they are given.
        shapes: the same for tensors without memory.
        devices: where it runs.
    """
    name = schema.partition("(")[0]
    _OPS.define(schema)
    for device in devices:
        _OPS.impl(name, run, device)
    torch.library.register_fake(f"sentei::{name}", shapes, lib=_OPS)


def differentiate_once(name: str, backward: Callable, save: Callable, *, impl: str, do: str) -> None:
    """Gives the op `name` first gradients; those of its op NAME_backward are refused with an ImplError.

    Args:
        backward, save: as `torch.library.register_autograd` takes them.
        impl, do: of the error: the implementation, and what to do instead.
    """
    def refuse(ctx, *gradients):
        raise ImplError(impl, expected="first gradients only", got="gradients of gradients", do=do)

    torch.library.register_autograd(f"sentei::{name}", backward, setup_context=save, lib=_OPS)
    torch.library.register_autograd(f"sentei::{name}_backward", refuse, lib=_OPS)


def differentiate_never(name: str, *, impl: str, do: str) -> None:
    """Refuses gradients of the op `name` with an ImplError."""
    def refuse(ctx, *gradients):
        raise ImplError(impl, expected="no gradients", got="a backward", do=do)

    torch.library.register_autograd(f"sentei::{name}", refuse, lib=_OPS)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton makes code for the device: Ampere and later, or the CPU where Triton was told to interpret."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    from triton import knobs

    return knobs.runtime.interpret
