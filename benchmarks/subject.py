"""What the benchmarks of quality measure: a model and windows of a text, named on the command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.measurement.text import read_text, windows_of


@dataclass(frozen=True)
class Subject:
    """The dense model and int64 [N, T] windows of text; `title` says both, `facts` is what a result depends on.

    `others` are windows that share no token with `windows`, to tune on.
    """

    model: nn.Module
    windows: torch.Tensor
    others: torch.Tensor
    title: str
    facts: dict


def parser(about: str) -> argparse.ArgumentParser:
    """The arguments every one of them takes; `about` is its docstring."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="as for `sentei prune`")
    made.add_argument("--text", type=Path, help="as for `sentei prune`")
    made.add_argument("--tokens", type=int, default=4096, help="of a window")
    made.add_argument("--windows", type=int, default=2, help="how many windows are read")
    return made


def read(model: nn.Module, windows: torch.Tensor, handles: list) -> None:
    """Lets the decoder read windows [N, T], one by one, while hooks look on, and removes their `handles`."""
    try:
        for row in windows:
            model.get_decoder()(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def load(arguments: argparse.Namespace, tune: int = 0) -> Subject:
    """Loads what `parser` was given, and `tune` windows more."""
    checkpoint, text = locate(arguments.model), read_text(arguments.text)
    windows = windows_of(load_tokenizer(checkpoint), text.text, length=arguments.tokens,
                         needed={"judge": arguments.windows, "tune": tune})
    title = f"{checkpoint.name}, float32, {text.name}: {arguments.windows} windows of {arguments.tokens:,} tokens."
    return Subject(load_model(checkpoint), windows["judge"], windows["tune"], title,
                   {"model": checkpoint.fingerprint, "text": text.sha256, "tokens": arguments.tokens,
                    "windows": arguments.windows})
