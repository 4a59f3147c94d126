"""The dtype a number is computed in: fp32 or wider where it chooses, autocast's where products may be narrower."""

import torch

NARROWED = (torch.float32, torch.bfloat16, torch.float16)  # by autocast


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_full(like: torch.Tensor) -> torch.autocast:
    """A block in which autocast makes nothing narrower, on the device of `like`."""
    return torch.autocast(like.device.type, enabled=False)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What torch's products of the tensor are in now: autocast's dtype where it is on, else the tensor's own.

    Autocast leaves float64 and whole numbers as they are.
    """
    if not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype not in NARROWED:
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def are_alike(*tensors: torch.Tensor | None) -> bool:
    """Whether products of the tensors, but for those that are None, are of one floating dtype and on one device."""
    kinds = {(product_dtype(tensor), tensor.device) for tensor in tensors if tensor is not None}
    return len(kinds) == 1 and all(dtype.is_floating_point for dtype, _ in kinds)
