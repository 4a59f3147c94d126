"""The trainable layer around the room experts: router, experts and shared ones; and a dense layer cut in such."""

import torch
from torch import nn

from sentei.axes.experts.dense import FeedForward, joined, parts
from sentei.axes.experts.gates import Soft, Task, Unit
from sentei.axes.experts.room import Config, Experts
from sentei.axes.experts.router import Router
from sentei.core.errors import RuleError, ShapeError
from sentei.kernels.routing.stack import ACTIVATIONS

PROBES = 256  # tokens by which a gate's first weights are told


class MixtureOfExperts(nn.Module):
    """A trainable feed-forward layer around `Experts`: x [..., T, width] → [..., T, width].

    It has the neurons of a dense layer, in (neurons ÷ unit - shared) experts to choose from and `shared` that all
    tokens keep.

    Args:
        config: how experts are made and chosen.
        width: D.
        neurons: of all experts together; a multiple of `config.unit`.
        gated: experts have a gate.
        activation: of the experts, a name of `ACTIVATIONS`.
        bias: added to the sum.
        causal: refuse what looks at later tokens.
    Raises:
        ShapeError: neurons that do not make whole experts, or no expert to choose.
        RuleError: a gate whose groups do not divide the experts.
    """

    def __init__(self, config: Config, *, width: int, neurons: int, gated: bool = True, activation: str = "silu",
                 bias: bool = False, causal: bool = True):
        super().__init__()
        num_experts = neurons // config.unit - config.shared
        if neurons % config.unit or num_experts < 1 or activation not in ACTIVATIONS:
            raise ShapeError("experts", expected=f"neurons a multiple of {config.unit} and more than the shared, an "
                             f"activation of {', '.join(ACTIVATIONS)}", got=f"{neurons}, {activation!r}",
                             do="choose another unit or size")
        self.config = config
        self.router = Router(config.gate, config.metric, width, num_experts)
        self.experts = Experts(config, num_experts, activation=activation, causal=causal)
        rows = config.unit * (2 if gated else 1)
        self.up = nn.Parameter(torch.empty(num_experts, rows, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, config.unit))
        self.shared = None if config.shared == 0 else FeedForward(width, config.shared * config.unit, gated=gated,
                                                                  activation=activation)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.draw()

    @torch.no_grad()
    def draw(self, *, up: float | None = None, down: float | None = None) -> None:
        """Draws the experts anew, so that they begin like a dense layer of as many neurons as a token keeps.

        The spread of a neuron does not depend on how many of them make an expert. A dense neuron counts 1; where a
        gate's weights add up to one number, so that each of k counts 1/k, `down` is divided by their size and the
        answers' variance is the dense layer's. Under Softmax, Choice and Soft a kept expert counts about 1/E at first
        and up to 1 when the router is sure: there experts begin as the dense layer and the sum smaller, as in Switch.

        Args:
            up: standard deviation of the dense layer's first projections, its gate too; that of nn.Linear if None,
                (3 · inputs)^-½.
            down: that of its last one.
        Reference: Moonlight, arXiv 2502.16982, appendix C, multiplies the gate by the same number instead: 1 over the
            root of the sum of the squared weights of a token, 2.446 for 6 of 64 experts under a sigmoid gate.
            DeepSeek-V3, arXiv 2412.19437, multiplies by 2.5 for 8 of 256 and does not say why: this number is 2.8
            there. He et al. 2024, arXiv 2410.07524, scale the weights of experts made from a dense layer.
        """
        kept, weight = self.kept_at_first()
        if up is None:
            up = (3 * self.up.shape[-1]) ** -0.5
        if down is None:
            down = (3 * max(kept + self.config.shared, 1) * self.config.unit) ** -0.5
        nn.init.normal_(self.up, std=up)
        nn.init.normal_(self.down, std=down / weight if self.config.gate.adds_up else down)
        if self.shared is not None:
            self.shared.draw(up=up, down=down)

    @torch.no_grad()
    def kept_at_first(self) -> tuple[float, float]:
        """How many experts a token keeps, and the root mean square of what one counts, while the router is as it is.

        Measured on normal tokens. One that counts 1, where nothing is kept, nothing computed (the meta device), or a
        slot of Soft has one expert.
        """
        gate, width = self.config.gate, self.up.shape[-1]
        if self.up.is_meta or isinstance(gate, Soft):
            return 1.0, 1.0
        x = torch.randn(1, PROBES, width, generator=torch.Generator().manual_seed(0), device="cpu").to(self.up)
        logits, _ = self.router(x, torch.zeros(1, dtype=torch.int64, device=x.device))
        rule = gate.rule(self.config.rule)
        selection = gate.weigh(rule(gate.shortlist(gate.scores(logits, None)), unit=self.config.unit), logits)
        kept = selection.weights[selection.ids >= 0]
        return (len(kept) / PROBES, float(kept.square().mean().sqrt())) if len(kept) else (1.0, 1.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None,
                tasks: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's answer.

        Args:
            mask: bool [..., T], the tokens that are no padding; the experts give the others 0.
            tasks: int64 [...], the task of each sequence, for a Task gate.
        """
        logits, noise = self.router(x, tasks)
        output = self.experts(x, logits, self.up, self.down, mask, noise)
        if self.shared is not None:
            output = output + self.shared(x)
        return output if self.bias is None else output + self.bias

    def update_bias(self) -> None:
        """See `Experts.update_bias`."""
        self.experts.update_bias()

    @torch.no_grad()
    def extract(self, task: int) -> FeedForward:
        """The dense layer that answers as this one does for `task`, with the neurons it keeps and no others.

        Raises:
            RuleError: a gate that is no Task gate.
        Reference: Kudugunta et al. 2021, arXiv 2110.03742.
        """
        if not isinstance(self.config.gate, Task):
            raise RuleError("extract", expected="a Task gate", got=repr(self.config.gate),
                            do="choose experts by the task, not by the token")
        tasks = torch.tensor(task, device=self.up.device)
        logits, _ = self.router(self.up.new_zeros(1, self.up.shape[-1]), tasks)
        selection = self.config.gate.weigh(self.experts.rule(logits), logits)
        ids, weights = selection.ids[0], selection.weights[0].to(self.down.dtype)
        stack = self.experts.stack(self.up[ids], self.down[ids] * weights[:, None, None])
        return joined(stack, self.shared, self.bias)


@torch.no_grad()
def from_dense(layer: nn.Module, config: Config, *, causal: bool = True) -> MixtureOfExperts:
    """The same layer with its neurons in experts of `config.unit`; with the rule All it computes the same function.

    Neurons stay in order: the first `config.shared` groups are shared. An expert's router row is the mean of its
    neurons' rows, so that a token goes where it looks alike (MoEfication, arXiv 2110.01786).

    Args:
        layer: gate_proj, up_proj and down_proj with an act_fn, as in Llama; the same without a gate; a `FeedForward`;
            or nn.Sequential of a linear layer, an activation and a linear layer.
        config: with the gate Unit; other weights are not those of the dense layer.
    Raises:
        ShapeError: another layer, an unknown activation, or a bias before the activation.
        RuleError: another gate.
    """
    if not isinstance(config.gate, Unit):
        raise RuleError("experts", expected="the gate Unit", got=repr(config.gate),
                        do="keep the dense layer's weights of 1")
    gate, up, down, activation = parts(layer)
    mixture = MixtureOfExperts(config, width=up.in_features, neurons=up.out_features, gated=gate is not None,
                               activation=activation, bias=down.bias is not None, causal=causal)
    mixture.to(device=up.weight.device, dtype=up.weight.dtype)
    first = config.shared * config.unit
    rows = [linear.weight[first:].unflatten(0, (-1, config.unit)) for linear in (gate, up) if linear is not None]
    mixture.up.copy_(torch.cat(rows, 1))
    mixture.down.copy_(down.weight[:, first:].unflatten(1, (-1, config.unit)).transpose(0, 1))
    mixture.router.weight.copy_(rows[0].mean(1))
    if down.bias is not None:
        mixture.bias.copy_(down.bias)
    if mixture.shared is not None:
        mixture.shared.up_proj.weight.copy_(up.weight[:first])
        mixture.shared.down_proj.weight.copy_(down.weight[:, :first])
        if gate is not None:
            mixture.shared.gate_proj.weight.copy_(gate.weight[:first])
    return mixture
