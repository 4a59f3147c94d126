"""Experts of one neuron, chosen by what their own gates say: contextual sparsity.

| query | candidate | score used to choose | value if kept | usual rule |
| token | neuron of a gated network | |act(gate_f x)| · scale_f | act(gate_f x) · (up_f x) · down_f | TopK, Mass |

    y = Σ over the neurons f kept of  a_f · (up_f x) · down_f         a_f = act(gate_f x)

All gates are read, then only the rows of up and of down that are kept: of three weights one and twice the share kept.
Scores are logarithms, so that a share of their softmax is a share of Σ a_f scale_f: Mass keeps the fewest neurons that
make up so much of it, Threshold those of at least so much of the largest. Many tokens together keep nearly every
neuron: there all are computed, and those that were not kept count 0.
References: CATS 2404.08763, TEAL 2408.14690 (thresholds on activations); Deja Vu 2310.17157.
"""

import torch
from torch.nn import functional as F

from sentei.axes.axis import Axis
from sentei.axes.experts.gates import Unit
from sentei.axes.experts.room import looks_ahead
from sentei.core.cost import Cost
from sentei.core.errors import ShapeError
from sentei.core.rules import Capacity, Rule, TopK
from sentei.kernels.routing import Stack, choose_impl, route

# Tokens of a call for which only what they keep is read; of more all neurons are.
FEW = 4


class Neurons(Axis):
    """The choice of neurons and their sum. It has no weights.

    Inputs: hidden [..., T, D], acts [..., T, F], which are act(gate x), scale [F] above 0, up [F, D] and down [F, O], a
    row a neuron; returns [..., T, O]. Gradients flow through what is kept, not through the choice.

    Args:
        rule: which neurons a token keeps; All is the dense layer.
        impl: the kernel of few tokens, see `route`.
    Raises:
        RuleError: the rule Capacity, which looks at later tokens.
    """

    def __init__(self, rule: Rule, *, impl: str = "auto"):
        super().__init__(rule)
        self.impl = impl
        if isinstance(rule, Capacity):
            raise looks_ahead(rule, Unit())

    def score(self, hidden, acts, scale, up, down):
        self.check(hidden, acts, scale, up, down)
        with torch.no_grad():
            return (acts.float().abs() * scale).clamp(min=torch.finfo(torch.float32).tiny).log()

    @staticmethod
    def check(hidden, acts, scale, up, down) -> None:
        """Raises a ShapeError unless the inputs fit together."""
        neurons = acts.shape[-1:]
        if not (hidden.dim() >= 2 and acts.shape[:-1] == hidden.shape[:-1] and scale.shape == neurons
                and up.shape == (*neurons, hidden.shape[-1]) and down.dim() == 2 and down.shape[:1] == neurons):
            raise ShapeError("neurons", expected="hidden [..., T, D], acts [..., T, F], scale [F], up [F, D], down "
                             "[F, O]", got=", ".join(str(list(t.shape)) for t in (hidden, acts, scale, up, down)),
                             do="give a row a neuron")

    def weigh(self, selection, scores, hidden, acts, scale, up, down):
        return selection.weigh(acts)

    def apply(self, selection, hidden, acts, scale, up, down):
        if hidden.flatten(0, -2).shape[0] > FEW:
            return F.linear(hidden, up).mul(selection.dense_weights().to(hidden.dtype)) @ down
        return self.of_few(hidden, selection.ids, selection.weights, up, down)

    def of_few(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: torch.Tensor,
               down: torch.Tensor) -> torch.Tensor:
        """The sum over neurons ids [..., T, K], weighed by their gates: only their rows are read."""
        answers = route(hidden.flatten(0, -2), ids.flatten(0, -2), weights.flatten(0, -2), _stack(up, down),
                        impl=self.impl)
        return answers.reshape(*hidden.shape[:-1], -1)

    def shortcut(self, hidden, acts, scale, up, down):
        """The same without a sorted selection, which would take as long as the layer: TopK, and many tokens."""
        self.check(hidden, acts, scale, up, down)
        few = hidden.flatten(0, -2).shape[0] <= FEW
        if isinstance(self.rule, TopK) and not isinstance(self.rule.k, tuple):
            size = acts.detach().float().abs() * scale
            ids = size.topk(min(self.rule.k, acts.shape[-1]), sorted=False).indices
            if few:
                return self.of_few(hidden, ids, acts.gather(-1, ids), up, down)
            keep = torch.zeros_like(acts, dtype=torch.bool).scatter(-1, ids, True)
        elif few:
            return None
        else:
            scores = self.score(hidden, acts, scale, up, down)
            nothing = torch.zeros_like(scores, dtype=torch.bool)
            keep = self.rule.keep(scores, ~nothing, nothing)
        return F.linear(hidden, up).mul(acts.masked_fill(~keep, 0)) @ down

    def account(self, selection, hidden, acts, scale, up, down):
        kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
        few = hidden.flatten(0, -2).shape[0] <= FEW
        each, gates = up.shape[1] + down.shape[1], permitted * up.shape[1]
        read = int((selection.load().reshape(-1, len(up)) > 0).any(0).sum()) if few else len(up)
        cost = Cost(multiply_adds=gates + (kept if few else permitted) * each,
                    dense_multiply_adds=gates + permitted * each,
                    bytes=(len(up) * up.shape[1] + read * each + hidden.numel()) * hidden.element_size())
        if not few:
            return cost, "eager", f"more than {FEW} tokens keep nearly every neuron together"
        tokens, ids, weights = (part.flatten(0, -2) for part in (hidden, selection.ids, selection.weights))
        return cost, *choose_impl(self.impl, tokens, ids, weights, _stack(up, down))


def _stack(up: torch.Tensor, down: torch.Tensor) -> Stack:
    """Experts of one neuron, whose gates are the weights they are given."""
    return Stack(up=up[:, None], down=down[:, :, None], activation="identity")
