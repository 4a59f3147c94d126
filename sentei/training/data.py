"""Text as tokens: made once, kept in a file that is mapped and not read, and cut into batches by step alone.

The tokens are cut into windows of context + 1 that share no token. Some, spread evenly, are held out; the others are
read in an order that each epoch draws anew from the seed. So a batch depends on (seed, step) and nothing else, and
resuming needs no iterator.
"""

import hashlib
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sentei.conversion.tokenizers import read_tokenizer, require_known
from sentei.core.errors import FileError, require
from sentei.core.safetensors_header import read_header
from sentei.core.storage import sha256, write_whole
from sentei.measurement.text import read_text

FORMAT = "sentei.tokens/1"
MAX_CONTEXT = 1 << 20
SMALL = 1 << 16  # vocabularies up to here fit two bytes a token
DTYPES = {"U16": torch.uint16, "I32": torch.int32}


class Tokenizer(Protocol):
    """What turns text into numbers.

    `vocabulary`: how many numbers there are; `end`: the one put after each text, or None; `identity`: differs for
    different tokenizers.
    """

    vocabulary: int
    end: int | None
    identity: str

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text."""

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""


class Bytes:
    """The bytes of UTF-8, 0 to 255, and 256 as the end of a text: a tokenizer that needs nothing."""

    vocabulary, end, identity = 257, 256, "bytes"

    def encode(self, text: str) -> np.ndarray:
        """The bytes of the text."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character, the end nothing."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class FromFile:
    """The tokenizer described by a tokenizer.json.

    Raises:
        FileError: the file is missing or malformed.
    """

    def __init__(self, path: Path):
        if path.name != "tokenizer.json" or not path.is_file():
            raise FileError(str(path), expected="a file called tokenizer.json", got="none", do="check the path")
        self.tokenizer = read_tokenizer(path.parent)
        self.vocabulary, self.end, self.identity = len(self.tokenizer), self.tokenizer.eos_token_id, sha256(path)
        self.where = str(path)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of the text, without any the tokenizer would add."""
        tokens = np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
        require_known(tokens.max(initial=0), self.vocabulary, self.where)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of the tokens."""
        return self.tokenizer.decode(tokens)


def documentation() -> list[str]:
    """The interpreter's documentation of the Python language, 375,000 characters."""
    return [read_text(None).text]


def library() -> list[str]:
    """The sources of Python's standard library, without its tests and what is installed beside it: 16 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages", "test", "tests"}
             & set(path.relative_to(root).parts))
    texts = (path.read_bytes().decode("utf-8", errors="replace") for path in paths)
    return [text for text in texts if text.strip()]


CORPORA: dict[str, Callable[[], list[str]]] = {"python-documentation": documentation, "python-library": library}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is read.

    Args:
        text: names of CORPORA, text files, and folders whose .txt files are meant, in order.
        tokenizer: "bytes", or the path of a tokenizer.json.
        context: tokens of a sequence.
        held_out: windows that are kept for evaluation.
    """

    text: tuple[str, ...] = ("python-documentation",)
    tokenizer: str = "bytes"
    context: int = 128
    held_out: int = 16

    def __post_init__(self):
        named = isinstance(self.text, tuple) and all(isinstance(name, str) and name for name in self.text)
        require("data", self, {
            "text a list of corpora, files or folders": named and len(self.text) > 0,
            "tokenizer 'bytes' or a path": isinstance(self.tokenizer, str),
            f"context from 1 to {MAX_CONTEXT}": type(self.context) is int and 1 <= self.context <= MAX_CONTEXT,
            "held_out from 1": type(self.held_out) is int and 1 <= self.held_out <= MAX_CONTEXT})


def texts_of(names: tuple[str, ...], folder: Path) -> list[str]:
    """The texts that `Config.text` names; paths are taken from `folder` on.

    Raises:
        FileError: nothing there, or a file that is no text, see `read_text`.
    """
    found = []
    for name in names:
        path = folder / name
        if name in CORPORA:
            found += CORPORA[name]()
        elif path.is_dir():
            paths = sorted(path.rglob("*.txt"))
            if not paths:
                raise FileError(str(path), expected="a folder with .txt files", got="none", do="check the path")
            found += [read_text(part).text for part in paths]
        elif path.exists():
            found.append(read_text(path).text)
        else:
            raise FileError(name, expected=f"one of {', '.join(CORPORA)}, a text file or a folder of them",
                            got="nothing at this path", do="check the path")
    return found


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    """The tokenizer that `Config.tokenizer` names."""
    return Bytes() if name == "bytes" else FromFile(folder / name)


def prepare(texts: list[str], tokenizer: Tokenizer, folder: Path) -> Path:
    """The file of the texts' tokens in `folder`, made unless it is there; its name is a digest of texts and tokenizer.

    Raises:
        ResourceError: it cannot be written.
    """
    from safetensors.torch import save_file

    digest = hashlib.sha256(f"{FORMAT} {tokenizer.identity}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    path = folder / f"tokens-{digest.hexdigest()[:16]}.safetensors"
    if not path.exists():
        end = [] if tokenizer.end is None else [tokenizer.end]
        kind = np.uint16 if tokenizer.vocabulary <= SMALL else np.int32
        parts = [np.asarray(part, dtype=kind) for text in texts for part in (tokenizer.encode(text), end)]
        tokens = np.concatenate(parts)
        about = {"format": FORMAT, "vocabulary": str(tokenizer.vocabulary),
                 "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        write_whole(path, partial(save_file, {"tokens": torch.from_numpy(tokens)}, metadata=about))
    return path


class Windows:
    """A file of tokens, cut into windows.

    Args:
        path: from `prepare`.
        context: tokens of a sequence; a window has one more, the last target.
        held_out: windows for evaluation.
        seed: of the order of the others.
    Raises:
        FileError: a file that is malformed or was changed, or too few tokens.
    Cost: one SHA-256 pass over the file; its pages are mapped and not copied.
    """

    def __init__(self, path: Path, *, context: int, held_out: int, seed: int):
        self.tokens, about = _map(path)
        self.vocabulary, self.sha256, self.seed = int(about["vocabulary"]), about["sha256"], seed
        self.size = context + 1
        number = len(self.tokens) // self.size
        if number <= held_out:
            raise FileError("data", expected=f"more than {held_out} windows of {self.size:,} tokens",
                            got=f"{len(self.tokens):,} tokens", do="give more text, or hold out fewer windows")
        places = [(2 * place + 1) * number // (2 * held_out) for place in range(held_out)]
        self.held_places = torch.tensor(places)
        kept = torch.ones(number, dtype=torch.bool)
        kept[self.held_places] = False
        self.places = kept.nonzero()[:, 0]

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The windows of a step, int64 [size, context + 1]; each is read once an epoch."""
        number = len(self.places)
        return self._read([self.places[order(number, self.seed, n // number)[n % number]]
                           for n in range(step * size, (step + 1) * size)])

    def held_out(self) -> torch.Tensor:
        """The windows for evaluation, int64 [held_out, context + 1]."""
        return self._read(self.held_places)

    def _read(self, places) -> torch.Tensor:
        return torch.stack([self.tokens[place * self.size:(place + 1) * self.size].long() for place in places])


@lru_cache(maxsize=2)
def order(number: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(mixed(seed, epoch)))


def mixed(*numbers: int) -> int:
    """A seed made of several numbers; others make another."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:8], "little") >> 1


def _map(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    """The tokens of a file, mapped, and what its header says of them; both checked."""
    from safetensors import safe_open

    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        plain = list(header) == ["tokens"] and len(header["tokens"].shape) == 1 and header["tokens"].dtype in DTYPES
        if about.get("format") != FORMAT or not plain or not re.fullmatch("[0-9]{1,9}", about.get("vocabulary", "")):
            raise FileError(str(path), expected=f"a file of tokens, {FORMAT}", got="another file",
                            do="remove it and run the same command again")
        tokens = file.get_tensor("tokens")
    content = tokens.numpy()
    known = 0 <= content.min(initial=0) <= content.max(initial=0) < int(about["vocabulary"])
    if hashlib.sha256(content).hexdigest() != about.get("sha256") or not known:
        raise FileError(str(path), expected="the tokens that were written", got="others",
                        do="remove it and run the same command again")
    return tokens, about
