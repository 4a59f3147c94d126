"""Adapters on disk, in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module path>.lora_A.weight [R, I]      .lora_B.weight [O, R]

The rule of a room is not a part of the format. What files say of themselves is read in `adapter_header`.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sentei.axes.rank import Config, LowRank, from_dense
from sentei.conversion.adapter_header import CONFIG, PREFIX, WEIGHTS, read_factors, read_values
from sentei.conversion.adapters import adapters_of, freeze_all_but_adapters, is_at, replace
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
        UnsupportedError: no adapter, a LowRankStack, or adapters of several scalings or dropouts.
        ResourceError: the files cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found = adapters_of(model)
    kinds = {(adapter.config.scaling, adapter.config.dropout) for adapter in found.values()}
    if len(kinds) != 1 or not all(isinstance(adapter, LowRank) for adapter in found.values()):
        raise UnsupportedError("adapter_files.write", expected="adapted linear layers of one scaling and dropout",
                               got=f"{len(found)} adapters of {len(kinds)} kinds: {', '.join(found)}"[:200],
                               do="add adapters with adapters.add")
    (scaling, dropout), folder = *kinds, Path(folder)
    rank, alpha = (Counter(getattr(adapter.config, name) for adapter in found.values()).most_common(1)[0][0]
                   for name in ("rank", "alpha"))
    tensors = {f"{PREFIX}{path}.lora_{letter}.weight": factor.detach().contiguous()
               for path, adapter in found.items() for letter, factor in (("A", adapter.a), ("B", adapter.b))}
    try:
        write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    except SafetensorError as error:
        raise cannot_write(folder / WEIGHTS, error) from error
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": scaling == "root", "bias": "none",
        "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None,
        "target_modules": _targets(model, list(found)),
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
    layers = dict(model.named_modules())
    configs = {path: settings.config_of(path, rule) for path in headers if path in layers}
    for path, factors in headers.items():
        _check_fits(layers.get(path), path, factors, configs.get(path), settings.targets, folder)
    made = {path: from_dense(layers[path], config) for path, config in configs.items()}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file, torch.no_grad():
            for path, factors in headers.items():
                for letter, factor in (("A", made[path].a), ("B", made[path].b)):
                    found = file.get_tensor(factors[letter][0])
                    if not torch.isfinite(found).all():
                        raise FileError(str(folder / WEIGHTS), expected="finite weights",
                                        got=f"NaN or infinity in {shown(factors[letter][0])}", do="write it again")
                    factor.copy_(found)
    except (OSError, SafetensorError) as error:
        raise FileError(str(folder / WEIGHTS), expected="tensors that can be read", got=str(error),
                        do="download the file again") from error
    replace(model, {id(layers[path]): layer for path, layer in made.items()})
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
                        targets=targets if isinstance(targets, list) else None)
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


def _check_fits(layer: nn.Module | None, path: str, factors: dict[str, tuple[str, Tensor]], config: Config | None,
                targets: list[str] | None, folder: Path) -> None:
    """Raises FileError unless the factors are those of this layer."""
    shapes = {letter: tensor.shape for letter, (_, tensor) in factors.items()}
    wanted = f"a plain nn.Linear at {shown(path)}, among the target_modules"
    if type(layer) is nn.Linear and (targets is None or any(is_at(path, target) for target in targets)):
        sizes = {"A": (config.rank, layer.in_features), "B": (layer.out_features, config.rank)}
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
