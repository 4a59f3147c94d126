"""A pruned model as a recipe: which parts of the dense model are left, and no weights.

None of the rivals changes a weight, so that a few thousand characters make the model again. A recipe is JSON-able:

| key | what it says |
|---|---|
| layers | numbers of the layers that are left, in order |
| neurons | for each of them, those of its feed-forward network that are left; a mask in hexadecimal |
| stream | the numbers of the residual stream that are left; a mask |
| experts | for each layer left, {"groups": a letter a neuron, "." for those of all tokens; "routers": a neuron each} |
| active | how many experts a token has |

What is not named is as in the dense model.
"""

import copy

import torch
from torch import nn

from sentei.conversion.linear import MEASURED
from sentei.kernels.routing import Stack, route

KEPT, SHARED, FIRST = "kept_layers", ".", ord("a")
READ_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")


def masked(kept: list[int], size: int) -> str:
    """Numbers below `size` as a mask in hexadecimal; `kept_by` reads it."""
    return f"{sum(1 << number for number in kept):0{-(-size // 4)}x}"


def kept_by(mask: str) -> torch.Tensor:
    """Int64 numbers, in order."""
    bits = int(mask, 16)
    return torch.tensor([number for number in range(4 * len(mask)) if bits >> number & 1], dtype=torch.int64)


def lettered(shared: list[int], experts: list[list[int]]) -> str:
    """Which expert each neuron is in: a letter, or SHARED."""
    letters = {neuron: SHARED for neuron in shared}
    letters |= {neuron: chr(FIRST + number) for number, own in enumerate(experts) for neuron in own}
    return "".join(letters[neuron] for neuron in range(len(letters)))


def shape_of(recipe: dict) -> tuple:
    """What the time of a recipe's model depends on: models of one shape are timed once."""
    neurons = [len(kept_by(mask)) for mask in recipe.get("neurons", ())]
    stream = len(kept_by(recipe["stream"])) if "stream" in recipe else 0
    shared = [layer["groups"].count(SHARED) for layer in recipe.get("experts", ())]
    return len(recipe["layers"]), *sorted(neurons), stream, *shared, recipe.get("active", 0)


def build(dense: nn.Module, recipe: dict) -> nn.Module:
    """The model of a recipe; what is as in `dense` is shared with it."""
    model = shared_copy(dense)
    layers = model.model.layers
    for place, number in enumerate(recipe["layers"]):
        if "neurons" in recipe:
            layers[number].mlp = narrowed(layers[number].mlp, kept_by(recipe["neurons"][place]))
        if "experts" in recipe:
            layers[number].mlp = Split(layers[number].mlp, **recipe["experts"][place], active=recipe["active"])
    if "stream" in recipe:
        _narrow_stream(model, kept_by(recipe["stream"]))
    _keep(model, recipe["layers"])
    return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A model of its own modules that shares the weights, and what was measured of layers to run them natively.

    So layers of one shape run in one way in all models.
    """
    shared = *model.parameters(), *model.buffers(), vars(model).setdefault(MEASURED, {})
    return copy.deepcopy(model, {id(each): each for each in shared})


def cache_of(model: nn.Module, prefix: object) -> object:
    """The part of a dense model's cache that a recipe's model can go on with."""
    if prefix is None or not hasattr(model, KEPT):
        return prefix
    part = copy.copy(prefix)
    part.layers = [prefix.layers[index] for index in getattr(model, KEPT)]
    return part


def narrowed(network: nn.Module, neurons: torch.Tensor) -> nn.Module:
    """A gated network with these neurons alone."""
    made = copy.copy(network)
    made._modules = dict(network._modules)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(network, name).weight.detach()
        part = weight[:, neurons] if name == "down_proj" else weight[neurons]
        linear = nn.Linear(*part.shape[::-1], bias=False, device="meta")
        _set(linear, part.contiguous())
        setattr(made, name, linear)
    return made


def _narrow_stream(model: nn.Module, kept: torch.Tensor) -> None:
    """Leaves some numbers of the stream in everything that reads or writes it."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in READ_STREAM:
            _set(module, module.weight.detach()[:, kept].contiguous())
        elif last in ("o_proj", "down_proj") or last.endswith("norm"):
            _set(module, module.weight.detach()[kept].contiguous())
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _set(module: nn.Module, weight: torch.Tensor) -> None:
    """Gives a module another weight, and the sizes that go with it."""
    module.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def _keep(model: nn.Module, kept: list[int]) -> None:
    """Leaves the other layers out and numbers these anew, as their places in a cache."""
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

    where a router's neuron reads a normalised token by normalised weights. A token's chosen experts are not weighed,
    and computed by sentei's own kernel.

    Args:
        network: transformers' own gated network.
        groups, routers: see the head of this file; experts are equally large.
        active: experts a token.
    """

    def __init__(self, network: nn.Module, groups: str, routers: list[int], active: int):
        super().__init__()
        own = [[at for at, letter in enumerate(groups) if letter == name]
               for name in (SHARED, *(chr(FIRST + number) for number in range(len(routers))))]
        experts = torch.tensor(own[1:])
        self.shared = narrowed(network, torch.tensor(own[0], dtype=torch.int64)) if own[0] else None
        self.act_fn, self.active = network.act_fn, active
        gate, up, down = (getattr(network, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj"))
        weights = {"gate": gate[experts], "up": up[experts], "down": down.T[experts].mT.contiguous()}
        weights["router"] = torch.cat([nn.functional.normalize(weight[routers], dim=1) for weight in (gate, up)])
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., D] of x [..., D]."""
        rows = x.flatten(0, -2)
        gate, up = nn.functional.linear(nn.functional.normalize(rows, dim=1), self.router).chunk(2, dim=1)
        chosen = (self.act_fn(gate) * up).abs().topk(self.active, dim=1).indices
        stack = Stack(up=self.up, down=self.down, gate=self.gate, activation="silu")
        output = route(rows, chosen, torch.ones_like(chosen, dtype=rows.dtype), stack)
        return (output if self.shared is None else output + self.shared(rows)).view_as(x)
