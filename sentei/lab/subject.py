"""The real model and the real text that claims about models are measured on; each is loaded once a process."""

from functools import cache

import torch

from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.measurement.text import read_text, windows_of


@cache
def default_model() -> tuple[torch.nn.Module, object, str]:
    """The embedded model in float32 and eval mode, its tokenizer, and where it comes from, in words."""
    found = locate()
    return load_model(found), load_tokenizer(found), found.source


def windows(length: int, number: int) -> torch.Tensor:
    """Windows of the interpreter's documentation for the default model, int64 [number, length], spread evenly."""
    _, tokenizer, _ = default_model()
    return windows_of(tokenizer, read_text(None).text, length=length, needed={"lab": number})["lab"]
