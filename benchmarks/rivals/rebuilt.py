"""A pruned model as a file says it: what differs from the dense weights, and which layers are left.

A file is safetensors: tensors by their names in transformers' own model, in whatever shapes they came to have, and in
the header `kept`, a JSON list of the numbers of the layers that are left (their tensors have the numbers that those
had in the dense model), and `groups`, how many query heads share a key/value head. A dense feed-forward network that
became experts is three tensors a layer beside the dense weights, see `Split`.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

KEPT = "kept_layers"
SHARED, EXPERTS, ROUTERS = (f"mlp.{name}_neurons" for name in ("shared", "expert", "router"))


def save(path: Path, state: dict[str, torch.Tensor], kept: list[int], **facts: object) -> None:
    """Writes tensors, the layers that are left and other facts, JSON-able."""
    header = {name: json.dumps(value) for name, value in {"kept": kept, **facts}.items()}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, str(path), header)


def rebuild(dense: nn.Module, path: Path) -> nn.Module:
    """The model of a file; what is as in `dense` is shared with it."""
    with safe_open(str(path), "pt") as file:
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
        state = {name: file.get_tensor(name) for name in file.keys()}
    model = shared_copy(dense)
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if last in (part.rpartition(".")[2] for part in (SHARED, EXPERTS, ROUTERS)):
            continue
        _set(model.get_submodule(owner), last, tensor)
    for index, layer in enumerate(model.model.layers):
        own = {part: state.get(f"model.layers.{index}.{part}") for part in (SHARED, EXPERTS, ROUTERS)}
        if own[EXPERTS] is not None:
            layer.mlp = Split(layer.mlp, own[SHARED], own[EXPERTS], own[ROUTERS], facts["active"])
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    _keep(model, facts["kept"])
    return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A model of its own modules that shares the weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def cache_of(model: nn.Module, prefix: object) -> object:
    """The part of a dense model's cache that a rebuilt one can go on with."""
    if prefix is None or not hasattr(model, KEPT):
        return prefix
    part = copy.copy(prefix)
    part.layers = [prefix.layers[index] for index in getattr(model, KEPT)]
    return part


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Gives a module another weight, and the sizes that go with it."""
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    if name == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    if name == "weight" and isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = tensor.shape


def _keep(model: nn.Module, kept: list[int]) -> None:
    """Leaves the other layers out and numbers these anew, as their places in a cache."""
    model.config = copy.deepcopy(model.config)
    model.model.config = model.config
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in kept)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    setattr(model, KEPT, kept)


class Split(nn.Module):
    """A gated network in experts, routed by one neuron each (CMoE, arXiv 2502.04416, without training).

        y = Σ shared h_f down_f + Σ over the `active` experts with the largest |h of their router neuron| …

    where a router's neuron reads a normalised token by normalised weights. A token's chosen experts are not weighed.

    Args:
        network: transformers' own gated network.
        shared: int64 [S], neurons that all tokens have.
        experts: int64 [E, U], those of each expert.
        routers: int64 [E], the neuron that stands for each expert.
        active: experts a token.
    """

    def __init__(self, network: nn.Module, shared: torch.Tensor, experts: torch.Tensor, routers: torch.Tensor,
                 active: int):
        super().__init__()
        self.shared = narrowed(network, shared)
        self.experts = nn.ModuleList(narrowed(network, neurons) for neurons in experts)
        self.act_fn, self.active = network.act_fn, active
        gate, up = (nn.functional.normalize(linear.weight[routers], dim=1)
                    for linear in (network.gate_proj, network.up_proj))
        self.router = nn.Parameter(torch.cat([gate, up]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., D] of x [..., D]; a loop over the experts that any token has chosen."""
        rows = x.flatten(0, -2)
        gate, up = nn.functional.linear(nn.functional.normalize(rows, dim=1), self.router).chunk(2, dim=1)
        chosen = (self.act_fn(gate) * up).abs().topk(self.active, dim=1).indices
        output = self.shared(rows)
        if len(rows) == 1:
            for expert in chosen[0].tolist():
                output += self.experts[expert](rows)
            return output.view_as(x)
        for expert, network in enumerate(self.experts):
            who = (chosen == expert).any(1).nonzero()[:, 0]
            if len(who):
                output.index_add_(0, who, network(rows[who]))
        return output.view_as(x)


def narrowed(network: nn.Module, neurons: torch.Tensor) -> nn.Module:
    """A gated network with these neurons alone."""
    made = copy.copy(network)
    made._modules = dict(network._modules)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(network, name).weight
        part = (weight[:, neurons] if name == "down_proj" else weight[neurons]).contiguous()
        linear = nn.Linear(*part.shape[::-1], bias=False, device="meta")
        _set(linear, "weight", part)
        setattr(made, name, linear)
    return made
