"""heads in a pretrained layer: its attention gets fewer key/value heads, other queries and another output.

    k = Σ_g u_g k_g     q'_h = conj(c_h) q_h     v = M [v_1 … v_m]     o_h = O'_h v      (`sentei.conversion.merging`)

Neighbours are merged, as grouped-query attention shares them. The result is a module of the model's own class with
projections of other sizes; its cache holds so many heads. Where a norm stands between the keys and their rotary
embedding (Qwen3, Gemma 3) no factor passes it: there one of the keys serves the group.
References: Ainslie et al. 2023, arXiv 2305.13245 (the mean).
"""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from sentei.axes.heads import Config
from sentei.conversion.attended import MOST_MERGED
from sentei.conversion.layers import Layer
from sentei.conversion.merging import chosen_key, merge_keys, merge_values
from sentei.conversion.statistics import State
from sentei.core.errors import UnsupportedError

# The attribute of an attention whose heads were merged that says which share of the scores' and of the outputs' squares
# was lost on the calibration text, the mean over what is left; NaN for keys that could only be chosen.
LOST = "lost_by_merging"
# And the one that holds a Fold.
FOLD = "fold_of_merging"


class Fold(NamedTuple):
    """How merged heads are made of those that were: of a cache as of the weights, because no phase stands between.

    Args:
        keys: complex128 [heads, F, m], what a merged key takes of each key of its group.
        values: float64 [heads, D, m · D].
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, T, D] of a cache of the dense layer, [B, heads · m, T, D]."""
        group, of = self.keys.shape[2], _complex(keys.double().mT).unflatten(1, (len(self.keys), -1))
        merged = _real(torch.einsum("hfm,bhmft->bhft", self.keys.to(of.device), of)).mT
        side_by_side = values.double().unflatten(1, (-1, group)).transpose(2, 3).flatten(3)
        mapped = side_by_side @ self.values.to(side_by_side).mT
        return merged.to(keys).contiguous(), mapped.to(values).contiguous()


def parts(config: Config) -> tuple[str, ...]:
    """The attention."""
    return ("attention",)


def wants(config: Config) -> tuple[str, ...]:
    """What heads do with one another's keys and values, unless they are averaged."""
    return () if config.num_kv_heads is None or config.merge == "mean" else ("attention_heads",)


def options(layer: Layer, lever: str) -> list[Config]:
    """All heads, then fewer and fewer, down to one of `attended.MOST_MERGED`; heads of odd size have no pairs.

    Where one norm is over all keys of a token together (OLMoE) none are merged.
    """
    _, kv_heads, size = layer.heads
    merges = size % 2 == 0 and not _is_normed_together(layer)
    most = max(m for m in range(1, MOST_MERGED + 1) if kv_heads % m == 0) if merges else 1
    groups = [m for m in range(2, most + 1) if most % m == 0]
    return [Config(merge="joint"), *(Config(num_kv_heads=kv_heads // m, merge="joint") for m in groups)]


def words(config: Config) -> str:
    """How many key/value heads there are."""
    return "all" if config.num_kv_heads is None else f"{config.num_kv_heads} key/value heads ({config.merge})"


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The attention with fewer key/value heads.

    Raises:
        UnsupportedError: key/value heads that do not divide the layer's, or that merge more than were calibrated
            together; or a norm over all keys of a token together.
    Cost: see `merge_keys` and `merge_values`, for every head that is left.
    """
    own = layer.attention
    heads, kv_heads, size = layer.heads
    kept = kv_heads if config.num_kv_heads is None else config.num_kv_heads
    if kept == kv_heads:
        return layer.places[part]
    if _is_normed_together(layer):
        raise UnsupportedError("heads", expected="keys without a norm over all heads", got=type(own).__name__,
                               do="keep all key/value heads of this model")
    attended = seen.get("attention_heads") if config.merge == "joint" else None
    if kv_heads % kept or attended is not None and attended.group % (kv_heads // kept):
        most = "" if attended is None else f", at most {attended.group} into one"
        raise UnsupportedError("heads", expected=f"key/value heads that divide {kv_heads}{most}", got=str(kept),
                               do="choose another num_kv_heads")
    if attended is None:
        new = {name: _linear(layer.member(name), _rows(layer.member(name), size).unflatten(0, (kept, -1)).mean(1))
               for name in ("k_proj", "v_proj")}
        told = {}
        if not hasattr(own, "k_norm"):
            group = kv_heads // kept
            ones = torch.ones(kept, size // 2, group, dtype=torch.complex128)
            each = torch.eye(size, dtype=torch.float64).repeat(kept, 1, group)
            told[FOLD] = Fold(ones / group, each / group)
    else:
        new, told = _joined(layer, attended, kept)
    made = layer.rebuilt("attention", new)
    made[0].num_key_value_groups = heads // kept
    for name, value in told.items():
        setattr(made[0], name, value)
    return made


def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """An attention of the same shapes."""
    made = build(layer, part, replace(config, merge="mean"), {})
    made[0].__dict__.pop(FOLD, None)  # it is not known how its weights were made
    return made


def _is_normed_together(layer: Layer) -> bool:
    """Whether one norm stands over the keys of all heads, whose sizes then hang together."""
    norm = getattr(layer.attention, "k_norm", None)
    return norm is not None and norm.weight.numel() != layer.heads[2]


@torch.no_grad()
def _joined(layer: Layer, attended: State, kept: int) -> tuple[dict[str, nn.Linear], dict[str, object]]:
    """The merged projections by name, and what scores and outputs lose (LOST), and how they were merged (FOLD)."""
    own, size, group = layer.attention, layer.heads[2], attended.kv_heads // kept
    linears = [layer.member(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    query, key, value = (_rows(linear, size) for linear in linears[:3])
    output = linears[3].weight.double().unflatten(1, (-1, size)).transpose(0, 1).clone()
    keys, values, lost, folds = [], [], [], ([], [])
    for index in range(kept):
        scores, moment, heads = attended.of(index, group)
        among = slice(index * group, (index + 1) * group)
        each = (heads.stop - heads.start) // group
        served = [head // each for head in range(heads.stop - heads.start)]
        if hasattr(own, "k_norm"):
            chosen = chosen_key(scores, served)
            keys.append(key[among][chosen])
            folds[0].append(torch.eye(group, dtype=torch.complex128)[chosen].expand(size // 2, -1))
            lost.append([float("nan")])
        else:
            found = merge_keys(scores, served)
            keys.append(_real((found.shared.T[..., None] * _complex(key[among])).sum(0)))
            folds[0].append(found.shared)
            query[heads] = _real(found.factors.conj()[..., None] * _complex(query[heads]))
            lost.append([found.error])
        merged = merge_values(moment, output[heads], served)
        values.append(merged.shared @ value[among].flatten(0, 1))
        folds[1].append(merged.shared)
        output[heads] = merged.outputs
        lost[-1].append(merged.error)
    rows = query, torch.stack(keys), torch.stack(values)
    firsts = [_linear(linear, each) for linear, each in zip(linears[:3], rows, strict=True)]
    last = copy.copy(linears[3])
    last._parameters = {**last._parameters, "weight": nn.Parameter(
        output.transpose(0, 1).flatten(1).to(last.weight), requires_grad=False)}
    return (dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), (*firsts, last), strict=True)),
            {FOLD: Fold(*map(torch.stack, folds)),
             LOST: tuple(sum(column) / kept for column in zip(*lost, strict=True))})


def _rows(linear: nn.Linear, size: int) -> torch.Tensor:
    """Float64 [heads, D, I]: the rows of each head, with the bias, if any, as a last column."""
    weight = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
    return weight.detach().double().unflatten(0, (-1, size))


def _linear(like: nn.Linear, rows: torch.Tensor) -> nn.Linear:
    """The layer of other rows, see `_rows`, in the dtype of `like`."""
    rows = rows.flatten(0, 1)
    made = nn.Linear(like.in_features, len(rows), bias=like.bias is not None, device="meta")
    made.weight = nn.Parameter(rows[:, :like.in_features].to(like.weight).contiguous(), requires_grad=False)
    if like.bias is not None:
        made.bias = nn.Parameter(rows[:, -1].to(like.bias).contiguous(), requires_grad=False)
    return made


def _complex(rows: torch.Tensor) -> torch.Tensor:
    """[heads, D, I] as complex numbers [heads, D / 2, I]: those that rotary embedding turns together."""
    return torch.complex(*rows.chunk(2, dim=-2))


def _real(rows: torch.Tensor) -> torch.Tensor:
    """The other way."""
    return torch.cat([rows.real, rows.imag], dim=-2)
