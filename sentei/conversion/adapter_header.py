"""What an adapter in PEFT's format says of itself: its settings and the header of its weights, checked without torch.

A config is data from a stranger: what changes the computation is read or refused, and its patterns are compared as
names, never run as regular expressions.
"""

import re
from pathlib import Path

from sentei.conversion.model_folder import MAX_CONFIG_BYTES, member
from sentei.core.errors import FileError, UnsupportedError, shown
from sentei.core.safetensors_header import Tensor, read_header
from sentei.core.storage import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_PATTERNS = 1024  # each is compared with each layer's path
PREFIX = "base_model.model."
_NAME = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
_PATTERN = re.compile(r"\^?[\w.]+")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Read here; each is checked where it is used.
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
         "target_parameters"}
# What else may be said without changing what the tensors compute: where they come from, and which layers were meant.
_SAID = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
         "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
         "runtime_config"}
# Understood at these values only. Other ways to begin (PiSSA, OLoRA, LoftQ) change the weights of the base model.
_ONLY = {"peft_type": ("LORA",), "bias": ("none",),
         "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
_NEUTRAL = (None, False, "", [], {})


def read_values(folder: Path) -> dict:
    """The contents of adapter_config.json; numbers are checked by those who use them.

    Raises:
        FileError: missing, malformed, or values of another kind.
        UnsupportedError: an adapter of another kind (DoRA, trained biases or embeddings, a changed base, …).
    """
    path = member(Path(folder), CONFIG)
    value = read_json(path, MAX_CONFIG_BYTES)
    for key, item in value.items():
        allowed = _ONLY.get(key, _NEUTRAL)
        if key not in _READ | _SAID and not any(type(item) is type(one) and item == one for one in allowed):
            raise UnsupportedError(str(path), expected="plain LoRA on linear layers", got=f"{key} {shown(item)}",
                                   do="merge the adapter into its base model with what made it")
    targets, stacked = value.get("target_modules"), value.get("target_parameters")
    ranks, alphas = value.get("rank_pattern") or {}, value.get("alpha_pattern") or {}
    checks = {
        "peft_type LORA": value.get("peft_type") == "LORA",
        "use_rslora true or false": type(value.get("use_rslora", False)) is bool,
        f"at most {MAX_PATTERNS:,} patterns from module names to numbers": all(
            isinstance(patterns, dict) and len(patterns) <= MAX_PATTERNS and all(map(_PATTERN.fullmatch, patterns))
            for patterns in (ranks, alphas)),
        "target_modules a list of names, or one name": targets is None or isinstance(targets, str) or (
            isinstance(targets, list) and all(isinstance(target, str) for target in targets)),
        f"target_parameters a list of at most {MAX_PATTERNS:,} names": stacked is None or (
            isinstance(stacked, list) and len(stacked) <= MAX_PATTERNS
            and all(isinstance(target, str) for target in stacked)),
    }
    for expected, holds in checks.items():
        if not holds:
            raise FileError(str(path), expected=expected, got=shown(value), do="write the adapter again")
    return value


def read_factors(folder: Path) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """By module path and factor, "A" or "B": the tensor's name and what the header says of it.

    Raises:
        FileError: missing or malformed weights, or a factor twice.
        UnsupportedError: tensors of another kind of adapter.
    """
    path = member(Path(folder), WEIGHTS, required=False)
    if path is None:
        raise FileError(str(folder), expected=f"adapter weights in {WEIGHTS}", got="none",
                        do="save the adapter with safetensors; other formats can hold code")
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in read_header(path).items():
        parts = _NAME.fullmatch(name)
        if parts is None or tensor.dtype not in _FLOATS:
            raise UnsupportedError(str(path), expected="lora_A and lora_B of linear layers",
                                   got=f"{shown(name)} of dtype {tensor.dtype}",
                                   do="merge the adapter into its base model with what made it")
        factors = found.setdefault(parts["path"], {})
        if parts["factor"] in factors:
            raise FileError(str(path), expected="each factor once", got=f"{shown(name)} twice", do="write it again")
        factors[parts["factor"]] = name, tensor
    return found
