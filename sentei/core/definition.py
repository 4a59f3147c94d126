"""The definition of the library, as a loop: score → select → compute → combine.

    y_q = Σ over candidates c kept by q of  w_qc · value_c(x_q)

Everything above this floor is this loop, faster. When the values are rows of data it is attention; when they are
functions of the query it is a mixture of experts.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch

from sentei.core.errors import ShapeError
from sentei.core.selection import Selection

Values = torch.Tensor | Sequence[Callable[[torch.Tensor], torch.Tensor]]


def apply(selection: Selection, values: Values, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Returns y [..., Q, D]; a query that keeps nothing gives 0.

    Args:
        selection: ids and weights [..., Q, K].
        values: rows [..., C, D], or C functions from a query's x [D_in] to [D].
        queries: x [..., Q, D_in]; needed when the values are functions.
    Raises:
        ShapeError: another number of candidates than the selection's, or functions without queries, or none of them.
    Cost: one value a kept candidate and nothing for the others; a Python loop, for reading and for tests.
    """
    is_rows = isinstance(values, torch.Tensor)
    num_candidates = values.shape[-2] if is_rows else len(values)
    if num_candidates != selection.num_candidates or (not is_rows and (queries is None or num_candidates == 0)):
        raise ShapeError("apply", expected=f"{selection.num_candidates} values; if functions, at least one and queries",
                         got=f"{num_candidates} values, queries {'absent' if queries is None else 'given'}",
                         do="give one value a candidate")
    *lead, num_queries, _ = selection.ids.shape
    outputs = []
    for place in product(*map(range, lead)):
        for q in range(num_queries):
            y = None
            for slot, c in enumerate(selection.ids[place][q].tolist()):
                if c < 0:
                    continue
                value = values[place][c] if is_rows else values[c](queries[place][q])
                term = selection.weights[place][q, slot] * value
                y = term if y is None else y + term
            outputs.append(y)
    rows = _stack(outputs, values, queries)
    return rows.reshape(*lead, num_queries, rows.shape[-1])


def _stack(outputs: list[torch.Tensor | None], values: Values, queries: torch.Tensor | None) -> torch.Tensor:
    """Rows of the result, with zeros for the queries that kept nothing."""
    some = next((y for y in outputs if y is not None), None)
    if some is not None:
        blank = torch.zeros_like(some)
    elif isinstance(values, torch.Tensor):
        blank = values.new_zeros(values.shape[-1])
    else:
        blank = torch.zeros_like(values[0](queries.new_zeros(queries.shape[-1])))
    return torch.stack([blank if y is None else y for y in outputs]) if outputs else blank.new_zeros(0, len(blank))
