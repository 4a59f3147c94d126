"""Text to calibrate and judge on: read with checks, and cut into windows that never share a token."""

import codecs
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from sentei.core.errors import FileError, SenteiError

MAX_TEXT_BYTES = 1 << 28
CHARACTERS_PER_TOKEN = 4
PIECE = 1 << 20  # bytes that are checked at a time


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text with its name for reports and the SHA-256 of its UTF-8 bytes."""

    name: str
    sha256: str
    text: str


def read_text(path: Path | None) -> Text:
    """The plain text in `path`, or, for None, the interpreter's own documentation of the Python language.

    The default is `pydoc_data.topics`: every topic in sorted order under its heading, without the paragraphs that a
    topic before has said word for word (a fifth of it: text for judging would otherwise repeat text for choosing).
    About 375,000 characters (90,000 tokens); its digest depends on the version of Python.

    Raises:
        FileError: nothing there, not a regular file, empty, not UTF-8, with NULs, or above 256 MB.
    """
    if path is None:
        from pydoc_data.topics import topics

        pages = [f"{name}\n{'=' * len(name)}\n\n{topics[name].strip()}" for name in sorted(topics)]
        return _text("Python's language documentation (pydoc_data.topics)", _said_once("\n\n".join(pages)) + "\n")
    try:
        if path.exists() and not path.is_file():
            raise FileError(str(path), expected="a plain text file", got="a folder" if path.is_dir() else "a device",
                            do="give one file; join several with `cat`")
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise FileError(str(path), expected=f"at most {MAX_TEXT_BYTES:,} bytes", got=f"{size:,}",
                            do="cut out the part to measure on")
        _check_plain(path)
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FileError(str(path), expected="a text file that can be read", got=str(error.strerror or error),
                        do="check the path") from error
    return _text(path.name, text)


def _check_plain(path: Path) -> None:
    """Raises FileError unless a file is text in UTF-8; piece by piece, as what is none may be large."""
    decoder, position, blank, start = codecs.getincrementaldecoder("utf-8")(), 0, True, b""
    with open(path, "rb") as file:
        for piece in chain(iter(lambda: file.read(PIECE), b""), [b""]):
            start, waiting = start or piece[:2], len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                wide = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                raise FileError(str(path), expected="text in UTF-8", got=f"byte {error.object[error.start]:#04x} "
                                f"at position {position - waiting + error.start:,}",
                                do=f"convert it, e.g. `iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8`") from error
            if "\0" in text:
                raise FileError(str(path), expected="a text", got=f"a NUL at position {position + piece.index(0):,}",
                                do="give plain text; what a program has written in UTF-16 converts with "
                                   "`iconv -f UTF-16`")
            position, blank = position + len(piece), blank and (text.lstrip("\ufeff") or " ").isspace()
    if blank:
        raise FileError(str(path), expected="a text", got="an empty file", do="check the path")


def _said_once(text: str) -> str:
    """The text without repeated paragraphs, whatever their indentation."""
    parts: dict[str, str] = {}
    for part in text.split("\n\n"):
        parts.setdefault(" ".join(part.split()), part)
    return "\n\n".join(parts.values())


def _text(name: str, text: str) -> Text:
    return Text(name=name, sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(), text=text)


def windows_of(tokenizer, text: str, *, length: int, needed: dict[str, int], wished: dict[str, int] | None = None
               ) -> dict[str, torch.LongTensor]:
    """The text as tokens, cut for each use by `cut`.

    A window begins with the model's own first token (<bos>) where the tokenizer puts one before a text: models trained
    with it keep their attention sink there. Those of an encoder stand between its own ([CLS] and [SEP]).

    Args:
        tokenizer: a transformers tokenizer.
        length: tokens of a window, the model's own included.
        wished: more windows of a use, as many as the text has beside those needed.
    """
    tokens, ends = _encoded(tokenizer, text)
    cuts = cut(tokens, length=length - sum(map(len, ends)), needed=_granted(len(tokens), length, needed, wished))
    return {use: _between(rows, ends) for use, rows in cuts.items()}


def spare_of(tokenizer, text: str, *, length: int, needed: dict[str, int], wished: dict[str, int] | None = None,
             size: int) -> torch.LongTensor:
    """What `windows_of` leaves of the text, int64 [n, size]: windows that share no token with those or one another.

    Args:
        size: tokens of a window; the others are as for `windows_of`.
    """
    tokens, ends = _encoded(tokenizer, text)
    own = size - sum(map(len, ends))
    needed = _granted(len(tokens), length, needed, wished)
    length -= size - own
    starts = sorted(start for _, start in _places(len(tokens), length, needed))
    gaps = zip([0, *(start + length for start in starts)], [*starts, len(tokens)], strict=True)
    rows = [torch.tensor(tokens[start:start + own], dtype=torch.int64)
            for begin, end in gaps for start in range(begin, end - own + 1, own)]
    return _between(torch.stack(rows) if rows else torch.empty((0, own), dtype=torch.int64), ends)


def _encoded(tokenizer, text: str) -> tuple[list[int], tuple[list[int], list[int]]]:
    """The tokens of a text, and those of the model's own that begin and end any text, if it has them.

    The last one is an encoder's alone: <eos> ends a text, and no window out of its middle.
    """
    around = tokenizer("")["input_ids"]
    first = [token for token in around[:1] if token in (tokenizer.bos_token_id, tokenizer.cls_token_id)]
    last = [token for token in around[1:][-1:] if first == [tokenizer.cls_token_id] and token == tokenizer.sep_token_id]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], (first, last)


def _granted(tokens: int, length: int, needed: dict[str, int], wished: dict[str, int] | None) -> dict[str, int]:
    """The windows needed, and of those wished as many as there are tokens for."""
    for use, count in (wished or {}).items():
        spare = max(0, tokens // max(length, 1) - sum(needed.values()))
        needed = {**needed, use: needed[use] + min(count, spare)}
    return needed


def _between(rows: torch.Tensor, ends: tuple[list[int], list[int]]) -> torch.Tensor:
    """Rows with the model's own tokens around them."""
    before, after = (torch.tensor(end, dtype=torch.int64).expand(len(rows), -1) for end in ends)
    return torch.cat([before, rows, after], 1)


def cut(tokens: Sequence[int], *, length: int, needed: dict[str, int]) -> dict[str, torch.LongTensor]:
    """Disjoint windows for each use, [n, length] int64, spread evenly over the text.

    The uses are interleaved, so that each sees the whole text; the same input always gives the same windows.

        >>> {use: windows.tolist() for use, windows in cut(range(6), length=2, needed={"a": 1, "b": 2}).items()}
        {'a': [[2, 3]], 'b': [[0, 1], [4, 5]]}

    Args:
        tokens: the whole text's token ids.
        length: tokens of a window.
        needed: windows of each use, e.g. {"calibrate": 1, "choose": 2, "verify": 2}.
    Raises:
        FileError: the text is too short.
        SenteiError: a length below 1, or a count below 0.
    """
    if length < 1 or any(count < 0 for count in needed.values()):
        raise SenteiError("workload", expected="windows of at least one token, counts of at least zero",
                          got=f"length {length}, windows {needed}", do="choose a longer workload")
    total = sum(needed.values())
    if total * length > len(tokens):
        raise FileError(
            "--text", expected=f"at least {total * length:,} tokens ({total} windows of {length:,}), "
                               f"roughly {total * length * CHARACTERS_PER_TOKEN:,} characters",
            got=f"{len(tokens):,} tokens", do="give a longer text, or choose a shorter workload")
    rows: dict[str, list[torch.Tensor]] = {use: [] for use in needed}
    for use, start in _places(len(tokens), length, needed):
        rows[use].append(torch.tensor(list(tokens[start:start + length]), dtype=torch.int64))
    return {use: torch.stack(windows) if windows else torch.empty((0, length), dtype=torch.int64)
            for use, windows in rows.items()}


def _places(tokens: int, length: int, needed: dict[str, int]) -> list[tuple[str, int]]:
    """The use and the start of every window of a text, in the text's order."""
    # Window j of n sits at (j + 1/2) / n of the text; sorting those places interleaves the uses.
    order = sorted(((2 * j + 1) / (2 * count), rank, use)
                   for rank, (use, count) in enumerate(needed.items()) for j in range(count))
    # The last window ends with the text; floors of equal steps >= length keep the windows apart.
    return [(use, place * (tokens - length) // max(len(order) - 1, 1)) for place, (_, _, use) in enumerate(order)]
