"""Claim 4: attention and a mixture of experts are one structure: query, key, value and a choice.

    y_q = Σ over the kept candidates c of  w_qc · value_c(x_q)      values: rows v_c, or functions expert_c

Measured is the largest difference, relative to the largest number, over draws in fp64: the definition of the library
against the textbook formulas of both; then each computed by the other's operation: attention by `route`, with experts
that are constants, and a mixture by scaled dot product attention, with the experts' answers as values.
Source: the lecture, the table of mechanisms; `sentei/core/definition.py`.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from sentei.core.definition import apply
from sentei.core.rules import All, TopK
from sentei.kernels.attention import Grid, Tiles, attend
from sentei.kernels.routing import route
from sentei.lab.finding import Finding, Row, measured
from sentei.measurement.charts import Chart, Series

CLAIM = "Attention and a mixture of experts are one structure: one definition computes both."
DRAWS, QUERIES, CANDIDATES, WIDTH, KEPT = 10, 6, 8, 16, 2
ROUNDING = 1e-12
NONE = 1e-17  # where a difference of nothing is drawn: an axis of powers has no 0
# What computes, as the picture names it, by the names of the table.
OPERATIONS = {"the definition": "the definition", "route, with constant experts": "route", "route": "route",
              "attend": "attention", "attention over the experts' answers": "attention"}


def measure(definition: Callable = apply) -> Finding:
    """Compares the definition with both textbooks, and each with the other.

    Args:
        definition: as `core.definition.apply`.
    Cost: below a second.
    """
    worst: dict[tuple[str, str], float] = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        query = torch.randn(QUERIES, WIDTH, dtype=torch.float64, generator=generator)
        key, value = torch.randn(2, CANDIDATES, WIDTH, dtype=torch.float64, generator=generator).unbind()
        weights = torch.randn(CANDIDATES, WIDTH, WIDTH, dtype=torch.float64, generator=generator) * WIDTH**-0.5
        experts = [lambda x, weight=weight: F.silu(x @ weight.T) for weight in weights]
        for what, found, expected in (*_by_definition(definition, query, key, value, experts),
                                      *_by_each_other(query, key, value, experts)):
            gap = ((found - expected).abs().max() / expected.abs().max()).item()
            worst[what] = max(worst.get(what, 0.0), gap)
    return judge([{"computed": what, "by": by, "largest difference": gap, "draws": DRAWS}
                  for (what, by), gap in worst.items()])


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    checks = [measured(f"{row['computed']} by {row['by']}: the largest relative difference is",
                       (row["largest difference"],) * 3, least=0, most=ROUNDING)
              for row in sorted(rows, key=lambda row: -row["largest difference"])]
    return Finding(claim=CLAIM, rows=tuple(rows), checks=tuple(checks), charts=(_chart(rows),), notes=(
        "What differs is what a value is: a row of data, or a function of the query.",))


def _chart(rows: list[Row]) -> Chart:
    """The differences of both by what computes them, and what rounding may come to."""
    labels = list(dict.fromkeys(OPERATIONS.values()))
    series = [Series(name="at most, by rounding", x=tuple(map(float, range(len(labels)))), y=(ROUNDING,) * len(labels),
                     expected=True)]
    for computed in dict.fromkeys(row["computed"] for row in rows):
        own = [row for row in rows if row["computed"] == computed]
        series.append(Series(name=computed, x=tuple(float(labels.index(OPERATIONS[row["by"]])) for row in own),
                             y=tuple(max(row["largest difference"], NONE) for row in own)))
    return Chart(title="Each computed by the other's operation, against its textbook formula.", x="computed by",
                 y="largest relative difference", log_y=True, labels=tuple(labels), series=tuple(series))


def textbook_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q·k / √D) V, as Vaswani et al. 2017 have it."""
    return (query @ key.T / key.shape[-1] ** 0.5).softmax(-1) @ value


def textbook_mixture(query: torch.Tensor, gates: torch.Tensor, experts: list, kept: int) -> torch.Tensor:
    """Σ over the `kept` largest gates of softmax(W_g x)_i · expert_i(x), renormalised; token by token."""
    rows = []
    for x in query:
        shares, ids = (gates @ x).softmax(0).topk(kept)
        rows.append(sum(share / shares.sum() * experts[number](x) for share, number in zip(shares, ids, strict=True)))
    return torch.stack(rows)


def _by_definition(definition, query, key, value, experts):
    """The definition of the library against the textbooks."""
    scores, gates = query @ key.T / key.shape[-1] ** 0.5, query @ key.T
    yield (("attention", "the definition"), definition(All()(scores).weigh_softmax(scores), value),
           textbook_attention(query, key, value))
    yield (("a mixture of experts", "the definition"), definition(TopK(KEPT)(gates).weigh_softmax(gates), experts,
                                                                  query), textbook_mixture(query, key, experts, KEPT))


def _by_each_other(query, key, value, experts):
    """Attention by routing and a mixture by attention, kernels of the library among them."""
    scores, gates = query @ key.T / key.shape[-1] ** 0.5, query @ key.T
    kept = All()(scores).weigh_softmax(scores)
    constants = [lambda x, row=row: row.expand(len(x), -1) for row in value]
    expected = textbook_attention(query, key, value)
    yield ("attention", "route, with constant experts"), route(query, kept.ids, kept.weights, constants), expected
    heads = (part[None, :, None] for part in (query, key, value))
    grid = Grid(num_queries=len(query), num_keys=len(key), query_block=64, key_block=64, causal=False)
    yield ("attention", "attend"), attend(*heads, Tiles(grid=grid), scale=WIDTH**-0.5)[0, :, 0], expected
    chosen = TopK(KEPT)(gates).weigh_softmax(gates)
    expected = textbook_mixture(query, key, experts, KEPT)
    yield ("a mixture of experts", "route"), route(query, chosen.ids, chosen.weights, experts), expected
    answers = torch.stack([expert(query) for expert in experts], 1)
    mask = chosen.mask()[:, None]
    gated = F.scaled_dot_product_attention(query[:, None], key.expand(len(query), -1, -1), answers, attn_mask=mask,
                                           scale=1.0)
    yield ("a mixture of experts", "attention over the experts' answers"), gated[:, 0], expected
