"""Perplexity, dense against pruned, on the same tokens."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sentei.core.errors import SenteiError

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


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Dense perplexity ÷ pruned perplexity, paired by token; 1 is no loss.

    Args:
        value: the ratio.
        low, high: its 95 % interval, over means of runs of RUN neighbouring tokens.
        dense, pruned: the two perplexities.
        tokens: how many were predicted.
    """

    value: float
    low: float
    high: float
    dense: float
    pruned: float
    tokens: int


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
