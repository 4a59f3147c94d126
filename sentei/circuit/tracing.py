"""`sentei.trace`: a trace that can be seen, and that knows which tokens its records are of."""

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sentei.circuit.capture import Spell
from sentei.circuit.page import render
from sentei.circuit.recorder import Facts, Recorder
from sentei.circuit.run import Circuit, Token
from sentei.core import tracing
from sentei.core.errors import SenteiError
from sentei.core.trace_header import RAN
from sentei.core.tracing import Tap, listening


class Trace(tracing.Trace):
    """The records of one `with trace(model)` block, and the calls they were made in; a notebook shows it as a page.

    Args:
        model: the one that is traced.
        tokenizer: gives tokens their text; without one they are numbers.
    """

    def __init__(self, model: nn.Module | None = None, tokenizer=None):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.calls: list[tuple[int, torch.Tensor]] = []  # how many records came before, and tokens int64 [B, T]

    def circuit(self, row: int = 0) -> Circuit:
        """The picture of one row of the batch: of the newest prompt in the trace, and of what was written after it.

        Raises:
            SenteiError: nothing was traced, or the model was not called with whole prompts and one new token at a time.
        """
        prompts = [index for index, (_, tokens) in enumerate(self.calls) if tokens.shape[1] > 1]
        first = prompts[-1] if prompts else 0
        if not self.calls or not len(self) or self.model is None or (row >= len(self.calls[first][1])):
            raise SenteiError("trace", expected="a call of a model with rooms inside the block", got=f"{len(self)} "
                              f"records of {len(self.calls)} calls, row {row}", do="run a converted model in the block")
        recorder, numbers = Recorder(Facts.of(self.model), row), []
        bounds = [start for start, _ in self.calls[first:]] + [len(self)]
        for (_, tokens), start, stop in zip(self.calls[first:], bounds[:-1], bounds[1:], strict=True):
            recorder.call(len(numbers), len(numbers) + tokens.shape[1])
            numbers += tokens[row].tolist()
            for record in self[start:stop]:
                recorder.append(record)
        recorder.bypasses = self.bypasses
        run = recorder.run(tuple(Token(id=number, text=self._spell(number)) for number in numbers),
                           prompt=self.calls[first][1].shape[1])
        return Circuit(kind=RAN, model=type(self.model).__name__, rule="the rooms of the model", runs=(run,))

    def _spell(self, number: int) -> str:
        return str(number) if self.tokenizer is None else spell(self.tokenizer)(number)

    def _repr_html_(self) -> str:
        """The circuit page in a frame of its own."""
        if not self.calls or not len(self):
            return "<p>sentei: a trace without records.</p>"
        page = html.escape(render(self.circuit()), quote=True)
        return ('<iframe title="the circuit of a run" width="100%" height="900" '
                f'sandbox="allow-scripts allow-downloads" srcdoc="{page}"></iframe>')


@contextmanager
def trace(model: nn.Module, tokenizer=None, into: tracing.Trace | None = None) -> Iterator[tracing.Trace]:
    """Records every selection made by `model` inside the block.

        with trace(model, tokenizer) as t:
            model(**inputs)
        t.density(), t.paths(), t    # a notebook shows the circuit page

    Args:
        tokenizer: gives tokens their text on the page.
        into: the trace to append to; a new one by default.
    Cost: memory for the selections (ids and weights); nothing is recomputed.
    """
    records = Trace(model, tokenizer) if into is None else into

    def before(module, args, kwargs):
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_tensor(tokens) and tokens.dim() == 2 and isinstance(records, Trace):
            records.calls.append((len(records), tokens.detach().cpu()))

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with listening(model, Tap, records):
            yield records
    finally:
        hook.remove()


def spell(tokenizer) -> Spell:
    """From a token's number to its text, by a tokenizer of transformers or of `sentei.training`.

    The text is what the token adds behind another one: where words are set apart by a space (WordPiece, SentencePiece)
    the space is a word's own. A token that is a part of a character in UTF-8 is told by its bytes, <e3 81>, where the
    tokenizer says which.
    """
    def text(number: int) -> str:
        found = tokenizer.decode([number])
        name = getattr(tokenizer, "convert_ids_to_tokens", lambda _: None)(number)
        fallback = _FALLBACK.fullmatch(name) if isinstance(name, str) else None
        if "�" in found and fallback:
            return f"<{fallback[1].lower()}>"
        if "�" in found and isinstance(name, str) and all(letter in _BYTES for letter in name):
            return "<" + " ".join(f"{_BYTES[letter]:02x}" for letter in name) + ">"
        if "�" in found and name is None and number < 256:
            return f"<{number:02x}>"
        twice = tokenizer.decode([number, number])
        return twice[len(found):] if twice.startswith(found) else found
    return text


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones as they are, others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(other)}


_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece names a byte
_BYTES = _byte_letters()
