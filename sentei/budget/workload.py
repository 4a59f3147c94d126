"""What is to become faster: the reading of a prompt, or the tokens that follow it.

A workload knows how a model does it once (to be timed), what is read of a row of text and how that tells the quality,
on how many texts, and which field of the room's configuration prunes it. Encoders read prompts as language models do,
but both ways, and what is read of them is another thing: `on_model` says whose work it is.
"""

import copy
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from sentei.conversion.cache import pruned_layers
from sentei.conversion.layers import family_of
from sentei.conversion.rooms.heads import FOLD
from sentei.core.errors import SenteiError, UnsupportedError
from sentei.measurement.quality import COSINE, PERPLEXITY, Measure, embedding_of, losses_after, token_losses

# Where one window is LONG tokens, a plan is chosen on one alone: what is chosen is proven on others, and choosing is
# what takes the time.
LONG = 4096


@dataclass(frozen=True)
class Workload(ABC):
    """One kind of work on `tokens` tokens.

    Attributes:
        kind: its name.
        lever: the field of the room's Config that holds the rule for it.
        per_head: whether that rule may differ by head.
        least: the fewest tokens that make sense.
        measure: of its quality.
    """

    tokens: int
    kind: ClassVar[str]
    lever: ClassVar[str]
    per_head: ClassVar[bool]
    least: ClassVar[int]
    measure: ClassVar[Measure] = PERPLEXITY

    def __str__(self) -> str:
        return f"{self.kind}:{self.tokens}"

    @property
    def windows(self) -> dict[str, int]:
        """How many texts of `tokens` tokens each use of a job needs; no two uses share a token."""
        return {"calibrate": 1, "choose": 1 if self.tokens >= LONG else 2, "verify": 2}

    @abstractmethod
    def by_encoder(self) -> "Workload":
        """The same work, done by an encoder.

        Raises:
            UnsupportedError: encoders do not do it.
        """

    @property
    @abstractmethod
    def timed_tokens(self) -> int:
        """How many tokens a timed run is about."""

    @property
    @abstractmethod
    def timed_runs(self) -> int:
        """How many passes through the model a timed run is."""

    @abstractmethod
    def prefix(self, model: nn.Module, row: torch.Tensor) -> object:
        """What a reading of a row begins with, as this model makes it."""

    @abstractmethod
    def opening(self, model: nn.Module, row: torch.Tensor) -> object:
        """What a timed run on a row begins with, as this model makes it."""

    @abstractmethod
    def answer(self, model: nn.Module, row: torch.Tensor, prefix: object) -> torch.Tensor:
        """What the measure compares, float64 [N]: for perplexity the negative log-likelihoods, in nats, of the tokens
        this work is about; for cosine the embedding of the row.
        """

    @abstractmethod
    def sample(self, model: nn.Module, row: torch.Tensor, prefix: object) -> None:
        """One pass through the model in which every layer receives what is typical of this work."""

    @abstractmethod
    def begin(self, model: nn.Module, row: torch.Tensor, opening: object) -> Callable[[], list[float]]:
        """Does what comes before the work, and returns the work itself, to be timed.

        The work returns the seconds of each of its passes through the model, `timed_runs` of them.
        """


def _clocked(passes: Iterable[Callable[[], object]]) -> list[float]:
    """The seconds of each."""
    seconds = []
    for one in passes:
        start = time.perf_counter()
        one()
        seconds.append(time.perf_counter() - start)
    return seconds


class Prefill(Workload):
    """Reading a prompt: a cache is filled and the logits of its last token are made, as `generate` does."""

    kind, lever, per_head, least = "prefill", "rule", True, 2

    @property
    def timed_tokens(self) -> int:
        """The prompt."""
        return self.tokens

    @property
    def timed_runs(self) -> int:
        """One."""
        return 1

    def prefix(self, model, row):
        """Nothing."""
        return None

    def opening(self, model, row):
        """Nothing."""
        return None

    def by_encoder(self):
        """Every token sees all others, and a text becomes an embedding."""
        return Embed(self.tokens)

    def answer(self, model, row, prefix):
        """Of every token of the row after its first."""
        return token_losses(model, row[None])[0]

    def sample(self, model, row, prefix):
        """The whole row."""
        model.get_decoder()(input_ids=row[None], use_cache=False)

    def begin(self, model, row, opening):
        """The whole reading is timed."""
        return torch.no_grad()(lambda: _clocked(
            [partial(model, input_ids=row[None], use_cache=True, logits_to_keep=1)]))


class Embed(Prefill):
    """Reading a text with an encoder: of its last states an embedding is made.

    An embedding is one observation, where a text for a language model is one for every few tokens: more are needed.
    """

    measure = COSINE

    @property
    def windows(self) -> dict[str, int]:
        """More texts."""
        return {"calibrate": 1, "choose": self.measure.texts, "verify": 24}

    def answer(self, model, row, prefix):
        """The embedding."""
        return embedding_of(model, row[None])[0]

    def begin(self, model, row, opening):
        """The whole reading is timed."""
        return torch.no_grad()(lambda: _clocked([partial(model, input_ids=row[None])]))


class Decode(Workload):
    """Writing one token at a time with a cache that ends at `tokens`.

    Quality is read from the last READ tokens, or the second half of fewer, AT_ONCE a call: each token chooses for
    itself, and what is installed for few rows takes as many, so it is what one by one gives. The prompt before them is
    in the prefix: for its losses a plan reads it itself (`Judge`), to be timed the dense model's serves any plan.
    """

    kind, lever, per_head, least = "decode", "decode", False, 8
    READ, ROWS, AT_ONCE, STEPS = 1024, 64, 8, 32

    @property
    def timed_tokens(self) -> int:
        """The steps of a timed run; one more comes before them."""
        return min(self.STEPS, self._read - 1)

    @property
    def timed_runs(self) -> int:
        """A pass a step."""
        return self.timed_tokens

    @property
    def _read(self) -> int:
        return min(self.READ, self.tokens // 2)

    def prefix(self, model, row):
        """The model's cache of the tokens before those that are read."""
        return self._cache(model, row[:-self._read])

    def opening(self, model, row):
        """The model's cache of the tokens before the last steps and one step more."""
        return self._cache(model, row[:-self.timed_tokens - 1])

    @torch.no_grad()
    def _cache(self, model, tokens):
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=tokens[None], past_key_values=cache, use_cache=True)
        return cache

    def by_encoder(self):
        """They write nothing."""
        raise UnsupportedError("--workload", expected="a prefill workload for an encoder, which writes no tokens",
                               got=str(self), do=f"name the texts it reads, e.g. --workload prefill:{self.tokens}")

    def answer(self, model, row, prefix):
        """Of the last tokens of the row; where nothing chooses pages, as in the dense model, all in one call."""
        rows = self.AT_ONCE if pruned_layers(model) else self.READ
        return losses_after(model, row, self._own(model, row, prefix), rows=rows)

    def _own(self, model, row, prefix) -> object:
        """A copy of a prefix; the dense model's is folded where the model has merged key/value heads.

        Where that cannot be, the model reads the tokens itself.
        """
        cache = copy.deepcopy(prefix)
        for layer, held in zip(model.get_decoder().layers, cache.layers, strict=False):
            project, fold = getattr(layer.self_attn, "k_proj", None), getattr(layer.self_attn, FOLD, None)
            if project is None or project.out_features == held.keys.shape[1] * held.keys.shape[3]:
                continue
            if fold is None:
                return self.prefix(model, row)
            held.keys, held.values = fold(held.keys, held.values)
        return cache

    def sample(self, model, row, prefix):
        """The first tokens after the prefix, as many as a call of ours decodes at once."""
        first = len(row) - self._read
        model.get_decoder()(input_ids=row[None, first:first + self.ROWS], past_key_values=self._own(model, row, prefix),
                            use_cache=True)

    @torch.no_grad()
    def begin(self, model, row, opening):
        """The cache is filled up to the last steps, and one step is made, in which a cache may take its final form."""
        cache, stop = self._own(model, row, opening), len(row) - self.timed_tokens - 1
        for start in range(cache.get_seq_length(), stop, self.ROWS):  # where it could not be folded
            part = row[None, start:min(start + self.ROWS, stop)]
            model.get_decoder()(input_ids=part, past_key_values=cache, use_cache=True)
        warm, *tokens = row[stop:].split(1)
        self._step(model, warm, cache)
        return lambda: _clocked(partial(self._step, model, token, cache) for token in tokens)

    @staticmethod
    @torch.no_grad()
    def _step(model, token, cache):
        """The most likely next token."""
        logits = model(input_ids=token[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())


def on_model(workload: Workload, model: nn.Module) -> Workload:
    """The workload as this model does it.

    Raises:
        UnsupportedError: an encoder that is to decode, or a model of no known family.
    """
    return workload if family_of(model).causal else workload.by_encoder()


def workload_of(text: str) -> Workload:
    """The workload that "prefill:4096" or "decode:8000" names.

    Raises:
        SenteiError: another form, or too few tokens.
    """
    kinds = {kind.kind: kind for kind in (Prefill, Decode)}
    match = re.fullmatch(r"([a-z]+):([0-9]{1,9})", text)
    kind = kinds.get(match[1]) if match else None
    if kind is None or int(match[2]) < kind.least:
        raise SenteiError("--workload", expected=" or ".join(
            f"{name}:TOKENS with at least {kind.least} tokens" for name, kind in kinds.items()),
            got=repr(text), do="name one, e.g. --workload prefill:4096")
    return kind(int(match[2]))
