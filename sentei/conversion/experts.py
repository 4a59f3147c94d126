"""Mixtures of experts of transformers models through `route`: its experts interface gets an implementation more.

    register_experts()
    model.set_experts_implementation("sentei")        # or from_pretrained(…, experts_implementation="sentei")

Every model whose experts are stacked weights can be run so (Mixtral, OLMoE, Qwen-MoE, DeepSeek, gpt-oss and others).
What is gated as usual, without biases, is a `Stack`; the rest is functions of its module's own parts.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from sentei.axes.rank import LowRankStack
from sentei.core.errors import UnsupportedError
from sentei.kernels.routing import Stack, route
from sentei.kernels.routing.stack import ACTIVATIONS

NAME = "sentei"


def register_experts() -> str:
    """Adds the implementation to transformers' table for this process, and returns its name; twice is no harm.

    Raises:
        UnsupportedError: a transformers without an experts interface.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise UnsupportedError("experts", expected="transformers with an experts interface", got=str(error),
                               do="install transformers 5 or newer") from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
    return NAME


def run_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls in place of an experts module's forward.

    Args:
        module: the experts, with the attributes of transformers' `use_experts_implementation`.
        hidden_states: [T, D].
        top_k_index: integers [T, K]; with expert parallelism those of other ranks are not below the number of experts.
        top_k_weights: [T, K].
    Returns:
        [T, D], of the dtype of hidden_states.
    """
    return routed(module, hidden_states, top_k_index, top_k_weights, _experts(module))


def routed(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
           experts: Sequence[Callable]) -> torch.Tensor:
    """`run_experts` with other functions in the place of the module's experts."""
    ids = top_k_index.long()
    if module._is_expert_parallel:
        ids = ids.masked_fill(ids >= module.num_experts, -1)
    return route(hidden_states, ids, top_k_weights, experts).to(hidden_states.dtype)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers gave the module what `run_experts` reads, and its weights are [E, O, I]."""
    return hasattr(module, "is_concatenated") and not module.is_transposed


def _experts(module: nn.Module) -> Stack | list[Callable]:
    from transformers.integrations.moe import _default_apply_gate

    activation = activation_of(module)
    plain = not (module.has_bias or module.has_post_expert_norm) and activation is not None
    down = module.down_proj.mT if module.is_transposed else module.down_proj
    if plain and not module.has_gate:
        return Stack(up=module.up_proj.mT if module.is_transposed else module.up_proj, down=down, activation=activation)
    if plain and module.is_concatenated and type(module)._apply_gate is _default_apply_gate:
        joint = module.gate_up_proj
        return Stack.from_joint(joint.mT if module.is_transposed else joint, down, activation)
    return [function_of(module, e) for e in range(len(down))]


def is_plain(module: nn.Module) -> bool:
    """Whether its experts are all here, gated as usual, without biases and of a known activation, [E, O, I]."""
    return is_experts(module) and not module._is_expert_parallel and isinstance(_experts(module), Stack) and (
        module.has_gate)


def function_of(module: nn.Module, e: int, adapters: Mapping[str, LowRankStack] = MappingProxyType({})
                ) -> Callable[[torch.Tensor], torch.Tensor]:
    """Expert e by the module's own parts, with the adapters of some of its weights, by name."""
    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias")[e] if module.has_bias else None
        if name in adapters:
            y = adapters[name][e](x)
            return y if bias is None else y + bias
        weight = getattr(module, name)[e]
        return nn.functional.linear(x, weight.T if module.is_transposed else weight, bias)

    def expert(x: torch.Tensor) -> torch.Tensor:
        if module.has_gate:
            acts = module._apply_gate(product(x, "gate_up_proj"))
        else:
            acts = module.act_fn(product(x, "up_proj"))
        answer = product(acts, "down_proj")
        return module.post_expert_norm(answer) if module.has_post_expert_norm else answer

    return expert


def activation_of(module: nn.Module) -> str | None:
    """The name of the module's activation, which is told by what it computes; looked up once for each."""
    act = getattr(module, "act_fn", None)
    known = module.__dict__.get("activation_of_sentei")
    if known is None or known[0] is not act:
        known = module.__dict__["activation_of_sentei"] = act, _name(act)
    return known[1]


@torch.no_grad()
def _name(act: Callable | None) -> str | None:
    x = torch.linspace(-12, 12, 4001)
    return next((name for name, function in ACTIVATIONS.items()
                 if act is not None and (act(x) - function(x)).abs().max() <= 1e-5), None)
