"""What a model's quality is beside the dense one's, on the same tokens: 1 for no loss.

Of a language model dense perplexity ÷ pruned perplexity, of an encoder the cosine of a text's two embeddings.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from sentei.core.errors import SenteiError
from sentei.geometry.intervals import mean_interval

# Rows of logits made at once: 1,024 x a vocabulary of 150,000 in fp32 is 0.6 GB.
ROWS_AT_ONCE = 1024
# Losses of neighbouring tokens are not independent: the interval is over means of runs of this many tokens.
RUN = 64


@torch.no_grad()
def token_losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token after the first, float64 [N, T - 1], in nats.

    Args:
        model: a transformers causal language model.
        tokens: int64 [N, T]; each row is read on its own.
    Cost: a forward pass a row; logits in slabs of ROWS_AT_ONCE.
    """
    return torch.stack([_losses_of(model, row) for row in tokens])


def _losses_of(model: nn.Module, row: torch.Tensor) -> torch.Tensor:
    return _losses(model, model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1], row[1:])


@torch.no_grad()
def losses_after(model: nn.Module, row: torch.Tensor, cache: object, *, rows: int) -> torch.Tensor:
    """The same for the tokens of a row whose beginning is in a cache, float64 [T - length of the cache - 1].

    Args:
        model: as in `token_losses`.
        row: int64 [T], from its first token on.
        cache: transformers' cache of its first tokens; it takes in the others.
        rows: how many tokens are read at once.
    """
    first = cache.get_seq_length()
    hidden = [model.get_decoder()(input_ids=part[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
              for part in row[first:-1].split(rows)]
    return _losses(model, torch.cat(hidden), row[first + 1:])


def _losses(model: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of tokens [N], from the decoder's states [N, width] that foretell them."""
    losses = [cross_entropy(logits_of(model, rows), targets, reduction="none")
              for rows, targets in zip(hidden.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True)]
    return torch.cat(losses).double()


def logits_of(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 [N, vocabulary] of the decoder's states [N, width], soft-capped where the model is."""
    logits = model.get_output_embeddings()(hidden).float()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@torch.no_grad()
def embedding_of(model: nn.Module, tokens: torch.Tensor | None, **more) -> torch.Tensor:
    """An encoder's embeddings of texts, the means of its last states over all tokens, float64 [N, width].

    Args:
        tokens: int64 [N, T], or None where `more` has what is read instead.
    """
    return model(input_ids=tokens, **more).last_hidden_state.double().mean(1)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a pruned model, paired with the dense one; 1 is no loss.

    Args:
        value: see the head of this file.
        low, high: its 95 % interval.
        dense, pruned: the two perplexities; None of encoders, which have none.
        tokens: how many were predicted, or the texts whose embeddings were compared.
    """

    value: float
    low: float
    high: float
    dense: float | None
    pruned: float | None
    tokens: int

    @property
    def nats(self) -> float:
        """What is lost, −ln of the value, in nats; negative of a gain."""
        return -math.log(max(self.value, 1e-9))


class Measure(ABC):
    """What is read of a model, and how two models' readings are compared.

    Attributes:
        name: of what a loss is told in, where a layer's options are priced.
        meaning: what the quality is, in words.
        texts: that the price of an option is read on.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    texts: ClassVar[int]

    @abstractmethod
    def compare(self, dense: torch.Tensor, pruned: torch.Tensor) -> Quality:
        """The quality from what was read of both models, float64 [N, …] of N texts."""

    @abstractmethod
    def answers(self, model: nn.Module, tokens: torch.Tensor | None, last: int, **more) -> torch.Tensor:
        """What tells a model from another on texts [N, T], or on what `more` has instead, fewer than for quality.

        Args:
            last: tokens of each text, where every token answers.
        """

    @abstractmethod
    def nats(self, dense: torch.Tensor, pruned: torch.Tensor) -> float:
        """What the second model has lost by its answers, in nats. Never below zero."""

    @abstractmethod
    def level(self, dense: torch.Tensor) -> float | None:
        """The dense model's own perplexity, from what was read of it; None where there is none."""

    @abstractmethod
    def lost(self, nats: float, level: float | None) -> float:
        """Nats in what the measure is told in, on top of that level."""


class Perplexity(Measure):
    """Of a language model: negative log-likelihoods are read."""

    name, meaning, texts = "perplexity", "dense perplexity ÷ pruned perplexity", 1

    def compare(self, dense, pruned):
        """See `compare`."""
        return compare(dense, pruned)

    @torch.no_grad()
    def answers(self, model, tokens, last, **more):
        """Log-probabilities of the next token, float32 [N, last, vocabulary]."""
        return model(input_ids=tokens, use_cache=False, logits_to_keep=last, **more).logits.float().log_softmax(-1)

    def nats(self, dense, pruned):
        """The mean of KL(dense ‖ pruned) over tokens."""
        return max(0.0, float(kl_div(pruned.flatten(0, -2), dense.flatten(0, -2), reduction="batchmean",
                                     log_target=True)))

    def level(self, dense):
        """Of the tokens that were read."""
        return math.exp(float(dense.mean()))

    def lost(self, nats, level):
        """What is added to the perplexity."""
        return level * math.expm1(min(nats, 50.0))


class Cosine(Measure):
    """Of an encoder: embeddings are read."""

    name, texts = "cosine", 8
    meaning = "the cosine of a text's embedding, the mean of its last states, with the dense model's; mean over texts"

    def compare(self, dense, pruned):
        """The mean over texts and its interval, Student's t.

        Raises:
            SenteiError: a single text, which says nothing about the spread.
        """
        if len(dense) < 2:
            raise SenteiError("quality", expected="at least two texts", got="one", do="measure on more windows")
        value, low, high = mean_interval(cosine_similarity(dense, pruned, dim=-1).tolist())
        return Quality(value=value, low=low, high=min(high, 1.0), dense=None, pruned=None, tokens=len(dense))

    def answers(self, model, tokens, last, **more):
        """Embeddings, float64 [N, width]."""
        return embedding_of(model, tokens, **more)

    def nats(self, dense, pruned):
        """−ln of the mean cosine."""
        return max(0.0, -math.log(max(float(cosine_similarity(dense, pruned, dim=-1).mean()), 1e-9)))

    def level(self, dense):
        """An embedding is worth nothing beside another."""
        return None

    def lost(self, nats, level):
        """What is taken off the cosine."""
        return -math.expm1(-nats)


PERPLEXITY, COSINE = Perplexity(), Cosine()


def compare(dense: torch.Tensor, pruned: torch.Tensor, run: int = RUN) -> Quality:
    """The quality from token losses [N, T] of both models on the same tokens.

    Args:
        run: how many neighbouring tokens count as one observation.

    Raises:
        SenteiError: a single run of tokens, which says nothing about its spread. Two rows are two runs.
    """
    difference = (pruned - dense).flatten()
    mean = difference.mean().item()
    runs = torch.stack([part.mean() for row in (pruned - dense) for part in row.split(run)])
    if len(runs) < 2:
        raise SenteiError("quality", expected=f"at least two runs of {run} tokens", got="one",
                          do="measure on more windows")
    margin = 1.96 * (runs.std() / math.sqrt(len(runs))).item()
    return Quality(value=math.exp(-mean), low=math.exp(-mean - margin), high=math.exp(-mean + margin),
                   dense=math.exp(dense.mean().item()), pruned=math.exp(pruned.mean().item()),
                   tokens=difference.numel())
