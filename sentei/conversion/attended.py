"""What the heads of an attention do with one another's keys and values: the statistic behind `conversion.merging`.

The attention function of transformers is watched, so that queries and keys are those after norms and rotary embedding,
whatever the family, and masks those of the layer.
"""

import torch
from torch import nn

# Key heads that are looked at together; more than these are never merged into one.
MOST_MERGED = 4
# A score counts as the attention does that it decides, and a little everywhere: what is overlooked today may not be so
# once scores have moved.
EVERYWHERE = 0.1
# Queries of a piece of text and keys of a query whose scores are read, evenly placed.
QUERIES, KEYS = 32, 64
# Queries whose attention is computed at once, over the keys that any of them may see.
AT_ONCE = 256
IMPLEMENTATION = "sentei_watched"
# The attribute of an attention that is watched.
STATE = "attended_of_sentei"


class Attended:
    """Sums over calls, in fp64, of products in fp32; m key/value heads are neighbours, side by side.

    Args:
        heads, kv_heads: of the layer.
        size: D, of a head.
    Attributes:
        scores: [H, 2 F m, 2 F m], the second moment of φ_fg = q_f · conj(k_gf) around its mean over a query's keys,
            which no softmax sees, weighed by the attention; see `merging.merge_keys`.
        values: [H, m D, m D], the second moment of what a query head attends to; see `merging.merge_values`.
        rows: tokens.
    Memory: 16 · H · (m D)² bytes.
    """

    def __init__(self, heads: int, kv_heads: int, size: int):
        self.kv_heads = kv_heads
        self.group = max(m for m in range(1, MOST_MERGED + 1) if kv_heads % m == 0)
        self.scores = torch.zeros(heads, self.group * size, self.group * size, dtype=torch.float64)
        self.values = torch.zeros(heads, self.group * size, self.group * size, dtype=torch.float64)
        self.rows = 0

    def see(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor,
            scaling: float) -> None:
        """Adds the tokens of a call: query [B, H, T, D], key and value [B, G, T, D], allowed bool [B or 1, 1, T, T].

        Cost: H attentions with values m times as wide, of causal ones little more than the half that is not masked, and
            QUERIES · KEYS · H · (m D)² multiply-adds.
        """
        per_group = query.shape[1] * self.group // key.shape[1]
        for b in range(len(query)):
            permitted = allowed[min(b, len(allowed) - 1), 0]
            pieces = [slice(start, start + AT_ONCE) for start in range(0, query.shape[2], AT_ONCE)]
            pieces = [(rows, _seen_by(permitted[rows])) for rows in pieces]
            for head in range(query.shape[1]):
                kept = slice(head // per_group * self.group, (head // per_group + 1) * self.group)
                own = key[b, head * key.shape[1] // query.shape[1]]
                values = value[b, kept].transpose(0, 1).flatten(1)
                for rows, keys in pieces:
                    weights = _weights(query[b, head, rows], own[keys], permitted[rows, keys], scaling)
                    seen = (weights.to(value.dtype) @ values[keys]).float()
                    self.values[head] += (seen.T @ seen).to(self.values)
                self.scores[head] += _score_moment(query[b, head], own, key[b, kept], permitted, scaling
                                                   ).to(self.scores)
            self.rows += query.shape[2]

    def merge(self, other: "Attended") -> None:
        """Adds what was seen of other rows."""
        self.scores += other.scores
        self.values += other.values
        self.rows += other.rows

    def of(self, kept: int, group: int) -> tuple[torch.Tensor, torch.Tensor, slice]:
        """The moments of scores and values for merged head `kept`, of `group` heads, and its query heads.

        `group` divides `self.group`.
        """
        each = len(self.scores) // (self.kv_heads // group)
        heads, inside = slice(kept * each, (kept + 1) * each), kept % (self.group // group)
        part = slice(inside * group, (inside + 1) * group)
        size = self.values.shape[1] // self.group
        scores = self.scores[heads].unflatten(2, (size // 2, self.group, 2)).unflatten(1, (size // 2, self.group, 2))
        values = self.values[heads].unflatten(2, (self.group, size)).unflatten(1, (self.group, size))
        return (scores[:, :, part, :, :, part].flatten(4).flatten(1, 3),
                values[:, part, :, part].flatten(3).flatten(1, 2), heads)


def _seen_by(permitted: torch.Tensor) -> slice:
    """The keys from the first to the last that any of these queries may see; permitted bool [queries, keys]."""
    places = permitted.any(0).nonzero()
    return slice(int(places.min()), int(places.max()) + 1) if len(places) else slice(0, permitted.shape[1])


def _weights(query: torch.Tensor, key: torch.Tensor, permitted: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention weights in fp32 [queries, keys] of query [queries, D] and key [keys, D]."""
    return (query @ key.mT * scaling).float().masked_fill(~permitted, -torch.inf).softmax(-1)


def _score_moment(query: torch.Tensor, own: torch.Tensor, key: torch.Tensor, permitted: torch.Tensor, scaling: float
                  ) -> torch.Tensor:
    """[2 F m, 2 F m]: of one query head, query [T, D], its key `own` [T, D], and the keys [m, T, D] of its group.

    Keys are drawn at even steps of the weights' sum, so that the same text always gives the same sample.
    """
    tokens = len(query)
    asked = torch.arange(1, QUERIES + 1, device=query.device) * tokens // QUERIES - 1
    asked = asked[asked >= 0].unique()
    permitted = permitted[asked]
    share = permitted / permitted.sum(1, keepdim=True).clamp(min=1)
    weights = (1 - EVERYWHERE) * _weights(query[asked], own, permitted, scaling) + EVERYWHERE * share
    steps = (torch.arange(KEYS, device=query.device) + 0.5) / KEYS
    heard = torch.searchsorted(weights.cumsum(1), steps.expand(len(asked), -1).contiguous()).clamp(max=tokens - 1)
    half = query.shape[1] // 2
    queries = torch.complex(query[asked, :half].float(), query[asked, half:].float())
    keys = torch.complex(key[..., :half].float(), key[..., half:].float())[:, heard]  # [m, queries, keys, F]
    products = torch.view_as_real(queries[:, None] * keys.conj()).permute(1, 2, 3, 0, 4).flatten(2)
    products = products - products.mean(1, keepdim=True)
    products = products.flatten(0, 1)
    return products.T @ products


class Watch:
    """Puts a state into an attention, and makes the whole model's attention one that tells it; `remove` ends that."""

    def __init__(self, attention: nn.Module, state: Attended):
        register()
        self.attention, self.before = attention, attention.config._attn_implementation
        setattr(attention, STATE, state)
        attention.config._attn_implementation = IMPLEMENTATION

    def remove(self) -> None:
        """The attention is as it was."""
        delattr(self.attention, STATE)
        if self.before != IMPLEMENTATION:
            self.attention.config._attn_implementation = self.before


def register() -> None:
    """Makes the watched attention known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, watched_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def watched_forward(module, query, key, value, attention_mask, scaling=None, **extra):
    """transformers' sdpa, before which the module's state, if it has one, sees the call."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    state = getattr(module, STATE, None)
    if state is not None:
        tokens = query.shape[2]
        allowed = attention_mask
        if allowed is None:
            allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device)
            allowed = allowed.tril() if getattr(module, "is_causal", True) else allowed
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        state.see(query, key, value, allowed if allowed.dtype is torch.bool else allowed >= 0, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **extra)
