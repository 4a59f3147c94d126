"""Whether a call made now is what it seems: on plain tensors, run at once, for their values."""

import torch
from torch import _C
from torch.autograd import forward_ad


def is_watched() -> bool:
    """Whether torch looks on at ops: a graph is compiled or traced, or a dispatch mode is on."""
    return bool(torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() or _C._get_tracing_state() is not None)


def is_transformed() -> bool:
    """Whether a function transform or a forward-mode gradient is on."""
    return _C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_plain_call() -> bool:
    """False while a graph is compiled or traced, or a dispatch or function mode, transform, autocast or forward-mode
    gradient is on. About a microsecond; some kernels are no longer than that."""
    return not (is_watched() or _C._len_torch_function_stack() or _C._is_any_autocast_enabled()
                or is_transformed())
