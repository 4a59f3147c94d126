"""Adapters all over a model: added by the names of its layers, merged, taken back, folded into plain weights."""

from collections.abc import Iterable, Mapping

from torch import nn

from sentei.axes.rank import Adapter, Config, LowRank, from_dense
from sentei.conversion.adapted import AdaptedStacks, check
from sentei.core.errors import RuleError, UnsupportedError
from sentei.core.rules import All


def add(model: nn.Module, targets: Iterable[str], config: Config) -> list[str]:
    """Gives the named linear layers and stacks of experts of a model an adapter, in place; then only adapters train.

        add(model, ["q_proj", "v_proj", "experts.down_proj"], rank.Config(rank=16))

    Args:
        targets: paths of modules or of stacked weights [E, O, I], or their last parts, e.g. "q_proj" or
            "layers.3.mlp.up_proj"; each must match one.
    Returns:
        The paths of the layers, in the model's order; one path for a layer that stands in several places.
    Raises:
        UnsupportedError: a target that matches nothing, or something else than a plain nn.Linear without an adapter
            or such a weight; weights stored [E, I, O].
        RuleError: a rule or a dropout that those weights cannot have.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    found = {path: module for path, module in model.named_modules(remove_duplicate=False)
             if path and any(is_at(path, target) for target in targets)}
    stacks = {path: part for path, part in model.named_parameters()
              if part.dim() == 3 and any(is_at(path, target) for target in targets)}
    idle = [target for target in targets if not any(is_at(path, target) for path in (*found, *stacks))]
    wrong = [path for path, module in found.items() if type(module) is not nn.Linear]
    wrong += [path for path in stacks if isinstance(model.get_submodule(path.rpartition(".")[0]), Adapter)]
    wrong += [path for path in stacks if isinstance(holder_of(model, path), AdaptedStacks) or "." not in path]
    if idle or wrong or not targets:
        raise UnsupportedError("adapters.add", expected="targets that name nn.Linear layers without an adapter, or "
                               "stacked weights", got=", ".join([*map(repr, idle), *wrong])[:200] or "no target",
                               do="give the ends of paths, as model.named_modules() and named_parameters() have them")
    holders = adapted_stacks(model, dict.fromkeys(stacks, config))
    replace(model, holders | {id(module): from_dense(module, config) for module in found.values()})
    freeze_all_but_adapters(model)
    return [path for path in adapters_of(model) if path in found or path in stacks]


def adapted_stacks(model: nn.Module, configs: Mapping[str, Config]) -> dict[int, AdaptedStacks]:
    """For `replace`: what stands in the place of the modules with the stacked weights at these paths.

    Raises:
        UnsupportedError, RuleError: see `adapted.check`; nothing is changed then.
    """
    holders: dict[str, dict[str, Config]] = {}
    for path, config in configs.items():
        holder, _, name = path.rpartition(".")
        holders.setdefault(holder, {})[name] = config
    bases = [(model.get_submodule(holder), named) for holder, named in holders.items()]
    for base, named in bases:
        check(base, named)
    return {id(base): AdaptedStacks(base, named) for base, named in bases}


def holder_of(model: nn.Module, path: str) -> nn.Module | None:
    """What holds the module that holds the weight at a path."""
    above = path.rpartition(".")[0]
    return model.get_submodule(above.rpartition(".")[0]) if above else None


def is_at(path: str, target: str) -> bool:
    """Whether `target` is the module path or its last parts."""
    return f".{path}".endswith(f".{target}")


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The layers with an adapter, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Leaves a gradient to the factors of the adapters alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for adapter in adapters_of(model).values():
        adapter.a.requires_grad_(True)
        adapter.b.requires_grad_(True)


def replace(model: nn.Module, layers: dict[int, nn.Module]) -> None:
    """Puts other modules in the place of those whose id() is given, wherever they stand."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in layers:
            model.set_submodule(path, layers[id(module)])


def merge(model: nn.Module) -> None:
    """Merges every adapter of the model; see `Adapter.merge`. Where one cannot be merged, none is."""
    found = adapters_of(model)
    for path, adapter in found.items():
        if not isinstance(adapter.rank.rule, All):
            raise RuleError(f"adapters.merge {path}", expected="the rule All", got=repr(adapter.rank.rule),
                            do="merge adapters that keep every direction")
    for adapter in found.values():
        adapter.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, to the bit."""
    for adapter in adapters_of(model).values():
        adapter.unmerge()


def remove(model: nn.Module, *, fold: bool = False) -> nn.Module:
    """Makes the adapted layers plain again, in place; returns the model.

    A folded weight that was shared, as an output layer's with the embedding, is its layer's own afterwards; tell the
    model's config before you save it.

    Args:
        fold: keep the change, in a new weight W + s·BA; else the layers are what they were, to the bit.
    Raises:
        RuleError: see `merge`, with `fold`.
        UnsupportedError: the model is itself such a layer, or holds a LowRankStack of its own.
    """
    found = {path: module for path, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, LowRank | AdaptedStacks)}
    known = {id(stack) for holder in found.values() for stack in holder.modules()}
    wrong = [path for path, module in adapters_of(model).items() if id(module) not in known]
    if wrong or "" in found:
        raise UnsupportedError("adapters.remove", expected="adapted layers inside a model",
                               got=", ".join(wrong)[:200] or "the model itself", do="use merge and `merged`")
    if fold:
        merge(model)
    made = {id(layer): layer.plain(fold=fold) if isinstance(layer, AdaptedStacks) else _plain(layer, fold)
            for layer in found.values()}
    replace(model, made)
    return model


def _plain(adapter: LowRank, fold: bool) -> nn.Linear:
    layer = nn.Linear(adapter.in_features, adapter.out_features, bias=adapter.bias is not None, device="meta")
    layer.weight = nn.Parameter(adapter.merged, requires_grad=False) if fold else adapter.weight
    layer.bias = adapter.bias
    return layer.train(adapter.training)
