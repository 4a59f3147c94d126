"""Adapters on disk, in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module path>.lora_A.weight [R, I]      .lora_B.weight [O, R]

The factors of a stack of E weights lie in one, A [E R, I] and B [O, R E], and have the path of the module that holds
the stack; where several of its stacks have adapters, as many `.base_layer` behind it as such stacks come later.

The rule of a room is not a part of the format. What files say of themselves is read in `adapter_header`.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sentei.axes.rank import Adapter, Config, LowRank, from_dense
from sentei.conversion.adapted import AdaptedStacks
from sentei.conversion.adapter_header import CONFIG, PREFIX, WEIGHTS, read_factors, read_values
from sentei.conversion.adapters import adapted_stacks, adapters_of, freeze_all_but_adapters, is_at, replace
from sentei.core.errors import FileError, RuleError, UnsupportedError, shown
from sentei.core.rules import All, Rule
from sentei.core.safetensors_header import Tensor
from sentei.core.storage import cannot_write, write_json, write_whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a checked adapter_config.json says: the defaults, and by pattern what differs."""

    scaling: str
    rank: int
    alpha: float
    dropout: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: list[str] | None
    stacked: list[str]

    def config_of(self, path: str, rule: Rule) -> Config:
        """The configuration of the adapter at a module path.

        Raises:
            RuleError: a number outside its range.
        """
        return Config(rule=rule, rank=_by_pattern(self.ranks, path, self.rank), scaling=self.scaling,
                      alpha=_by_pattern(self.alphas, path, self.alpha), dropout=self.dropout)


def write(model: nn.Module, folder: Path, *, base: str | None = None) -> None:
    """Writes the adapters of a model for PEFT, and for `load`.

    Args:
        base: the name or path of the model the adapters belong to, for those who read the file.
    Raises:
        UnsupportedError: no adapter, a LowRankStack that no module holds, a stack's dropout, which PEFT has not, or
            adapters of several scalings or dropouts.
        ResourceError: the files cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found = adapters_of(model)
    kinds = {(adapter.config.scaling, adapter.config.dropout) for adapter in found.values()}
    linear = [path for path, adapter in found.items() if isinstance(adapter, LowRank)]
    names = file_names({path: list(holder.stacks) for path, holder in model.named_modules()
                        if isinstance(holder, AdaptedStacks)})
    strange = [path for path in found if path not in linear and (path not in names or found[path].config.dropout)]
    if len(kinds) != 1 or strange:
        raise UnsupportedError("adapter_files.write", expected="adapted layers of one scaling and dropout, stacks of "
                               "experts without dropout",
                               got=f"{len(found)} adapters of {len(kinds)} kinds: {', '.join(found)}"[:200],
                               do="add adapters with adapters.add")
    (scaling, dropout), folder = *kinds, Path(folder)
    rank, alpha = (Counter(getattr(adapter.config, name) for adapter in found.values()).most_common(1)[0][0]
                   for name in ("rank", "alpha"))
    tensors = {f"{PREFIX}{names.get(path, path)}.lora_{letter}.weight": factor.detach().contiguous()
               for path, adapter in found.items() for letter, factor in in_one(adapter).items()}
    try:
        write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    except SafetensorError as error:
        raise cannot_write(folder / WEIGHTS, error) from error
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": scaling == "root", "bias": "none",
        "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None,
        "target_modules": _targets(model, linear), "target_parameters": list(names) or None,
        "rank_pattern": {f"^{path}": adapter.config.rank for path, adapter in found.items()
                         if adapter.config.rank != rank},
        "alpha_pattern": {f"^{path}": adapter.config.alpha for path, adapter in found.items()
                          if adapter.config.alpha != alpha},
    })


def load(model: nn.Module, folder: Path, *, rule: Rule | None = None) -> list[str]:
    """Gives a model the adapters of a folder, written by PEFT or by `write`; then only adapters are trainable.

    Args:
        model: the base model, without adapters.
        rule: for every adapter; All, which is what the file was trained with, by default.
    Returns:
        The paths of the adapted layers. No layer is replaced where anything is refused.
    Raises:
        FileError: a file that is missing, malformed or does not fit the model.
        UnsupportedError: an adapter of another kind (DoRA, trained biases or embeddings, a changed base, …).
    Cost: the factors once, in the dtype of each layer.
    """
    from safetensors import SafetensorError, safe_open

    folder, rule = Path(folder), All() if rule is None else rule
    settings, headers = read_settings(folder), read_factors(folder)
    if adapters_of(model):
        raise UnsupportedError("adapter_files.load", expected="a model without adapters", got="one with adapters",
                               do="take them away with adapters.remove")
    paths = {name: path for path, name in file_names(_stacked(model, settings.stacked)).items()}
    headers = {paths.get(name, name): factors for name, factors in headers.items()}
    stacks = set(paths.values())
    layers = {path: layer for path, layer in (*model.named_modules(), *model.named_parameters())
              if path in stacks or _is_targeted(path, layer, settings.targets)}
    configs = {path: settings.config_of(path, rule) for path in headers if path in layers}
    for path, factors in headers.items():
        _check_fits(layers.get(path), path, factors, configs.get(path), folder)
    made, holders = _adapted(model, layers, configs)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file, torch.no_grad():
            for path, factors in headers.items():
                for letter, factor in (("A", made[path].a), ("B", made[path].b)):
                    found = file.get_tensor(factors[letter][0])
                    if not torch.isfinite(found).all():
                        raise FileError(str(folder / WEIGHTS), expected="finite weights",
                                        got=f"NaN or infinity in {shown(factors[letter][0])}", do="write it again")
                    factor.copy_(apart(found, letter, factor))
    except (OSError, SafetensorError) as error:
        raise FileError(str(folder / WEIGHTS), expected="tensors that can be read", got=str(error),
                        do="download the file again") from error
    replace(model, holders | {id(layers[path]): layer for path, layer in made.items() if isinstance(layer, LowRank)})
    freeze_all_but_adapters(model)
    return list(made)


def read_settings(folder: Path) -> Settings:
    """The checked contents of adapter_config.json; see `load` for what it raises."""
    path, value = Path(folder) / CONFIG, read_values(Path(folder))
    targets = value.get("target_modules")
    rank, alpha, dropout = value.get("r", 8), value.get("lora_alpha", 8), value.get("lora_dropout", 0.0)
    ranks, alphas = value.get("rank_pattern") or {}, value.get("alpha_pattern") or {}
    settings = Settings(scaling="root" if value.get("use_rslora", False) else "rank", rank=rank, alpha=alpha,
                        dropout=dropout, ranks=ranks, alphas=alphas,
                        targets=targets if isinstance(targets, list) else None,
                        stacked=value.get("target_parameters") or [])
    said = [(rank, alpha), *((one, alpha) for one in ranks.values()), *((rank, one) for one in alphas.values())]
    for rank, alpha in said:
        try:
            Config(rule=All(), rank=rank, scaling=settings.scaling, alpha=alpha, dropout=dropout)
        except RuleError as error:
            raise FileError(str(path), expected=error.expected, got=shown(value), do="write the adapter again"
                            ) from error
    return settings


def _by_pattern(patterns: dict, path: str, default):
    """The value of the first pattern that names the path: its last parts, or, after "^", all of it."""
    return next((value for pattern, value in patterns.items()
                 if (path == pattern[1:] if pattern.startswith("^") else is_at(path, pattern))), default)


def file_names(stacks: dict[str, list[str]]) -> dict[str, str]:
    """By the path of a stack the one its factors have in a file.

    Args:
        stacks: those with adapters by the path of the module that holds them, in its order of parameters.
    """
    return {f"{holder}.{name}": holder + ".base_layer" * later
            for holder, names in stacks.items() for later, name in zip(reversed(range(len(names))), names, strict=True)}


def in_one(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The factors as a file has them, A [R, I] or [E R, I] and B [O, R] or [O, R E]."""
    if adapter.a.dim() == 2:
        return {"A": adapter.a, "B": adapter.b}
    return {"A": adapter.a.flatten(0, 1), "B": adapter.b.permute(1, 2, 0).flatten(1)}


def apart(found: torch.Tensor, letter: str, factor: torch.Tensor) -> torch.Tensor:
    """A factor of a file, in the shape of the adapter's."""
    if factor.dim() == 2:
        return found
    experts = len(factor)
    return found.unflatten(0, (experts, -1)) if letter == "A" else found.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _stacked(model: nn.Module, targets: list[str]) -> dict[str, list[str]]:
    """For `file_names`: what of a model the target_parameters of a file name."""
    found = {path: [name for name, part in module.named_parameters(recurse=False)
                    if part.dim() == 3 and any(is_at(f"{path}.{name}", target) for target in targets)]
             for path, module in model.named_modules() if path}
    return {path: names for path, names in found.items() if names}


def _is_targeted(path: str, layer: nn.Module | nn.Parameter, targets: list[str] | None) -> bool:
    return type(layer) is nn.Linear and (targets is None or any(is_at(path, target) for target in targets))


def _adapted(model: nn.Module, layers: dict[str, nn.Module | nn.Parameter], configs: dict[str, Config]
             ) -> tuple[dict[str, Adapter], dict[int, AdaptedStacks]]:
    """New adapters by path, and what holds those of stacks, for `replace`."""
    holders = adapted_stacks(model, {path: config for path, config in configs.items()
                                     if isinstance(layers[path], nn.Parameter)})

    def adapter(path: str) -> Adapter:
        if isinstance(layers[path], nn.Linear):
            return from_dense(layers[path], configs[path])
        holder, _, name = path.rpartition(".")
        return holders[id(model.get_submodule(holder))].stacks[name]

    return {path: adapter(path) for path in configs}, holders


def _check_fits(layer: nn.Module | nn.Parameter | None, path: str, factors: dict[str, tuple[str, Tensor]],
                config: Config | None, folder: Path) -> None:
    """Raises FileError unless the factors are those of this layer."""
    shapes = {letter: tensor.shape for letter, (_, tensor) in factors.items()}
    wanted = f"a plain nn.Linear at {shown(path)}, among the target_modules, or a stack among the target_parameters"
    if layer is not None:
        *experts, outputs, inputs = (layer.weight if isinstance(layer, nn.Linear) else layer).shape
        rank = config.rank * math.prod(experts)
        sizes = {"A": (rank, inputs), "B": (outputs, rank)}
        if shapes == sizes:
            return
        wanted = f"factors {sizes} at {shown(path)}"
    raise FileError(str(folder / WEIGHTS), expected=wanted, got=f"{type(layer).__name__}, {shapes}",
                    do="use the base model the adapter was trained on, unpruned")


def _targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Last parts of the paths where these name no other module, as PEFT writes them; else whole paths."""
    def last(path: str) -> str:
        return path.rpartition(".")[2]

    others = {last(path) for path, _ in model.named_modules() if path not in paths}
    return sorted({last(path) if last(path) not in others else path for path in paths})
