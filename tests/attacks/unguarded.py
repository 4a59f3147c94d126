"""Attacks with one guard taken away: each must go through, or the guard, or the attack, is worth nothing.

    python tests/attacks/unguarded.py FOLDER

prints what came of each as `guarded.py` does, with the name of the guard.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import guarded  # noqa: E402  (it is a script beside this one)

ENDLESS = 1 << 60


def nothing(*_, **__) -> None:
    """In place of a check."""


def joined(folder: Path, name: str, *, required: bool = True) -> Path:
    """In place of `member`."""
    return folder / name


def finite(tensor: object) -> object:
    """In place of `torch.isfinite`."""
    import torch

    return torch.ones(1, dtype=torch.bool)


def raw_lines(error: object) -> str:
    """In place of `SenteiError.lines`."""
    return f"error    {error.where}\nexpected {error.expected}\ngot      {error.got}\ndo this  {error.do}"


# The guard: its module, name and replacement, then the door and the attack that it stands against.
CORE, CONVERSION = "sentei.core.", "sentei.conversion."
GUARDS: tuple[tuple[str, str, object, str, str], ...] = (
    (CORE + "safetensors_header", "MAX_HEADER_BYTES", ENDLESS, "safetensors", "a name of emoji, 60 MB"),
    (CORE + "safetensors_header", "regular_size", lambda path: path.stat().st_size, "tokens", "a pipe"),
    (CORE + "storage", "_unique_keys", dict, "config.json", "a key twice"),
    (CORE + "errors", "SenteiError.lines", raw_lines, "sharded safetensors",
     "a shard called 'a\\x1b[31m\\u202e.safetensors'"),
    ("pathlib", "Path.is_symlink", lambda path: False, "folder of a run", "metrics.jsonl leads elsewhere"),
    (CONVERSION + "gguf_header", "MAX_TENSORS", ENDLESS, "GGUF", "900,000 tensors"),
    (CONVERSION + "gguf_header", "MAX_TEXT_BYTES", ENDLESS, "GGUF", "400 MB of texts"),
    (CONVERSION + "gguf_header", "MAX_TEXTS", ENDLESS, "GGUF", "16 million empty texts"),
    (CONVERSION + "families", "Family.check_tensors", nothing, "GGUF", "a width it does not have"),
    (CONVERSION + "model_folder", "_TOKENIZER_KEYS", (), "tokenizer", "another file"),
    (CONVERSION + "model_folder", "_check_templates", nothing, "tokenizer", "a template named out of the folder"),
    (CONVERSION + "model_folder", "member", joined, "config.json", "a link that leads elsewhere"),
    (CONVERSION + "tokenizers", "_Building.kinds", (ValueError,), "tokenizer", "nested deep"),
    (CONVERSION + "adapter_header", "MAX_PATTERNS", ENDLESS, "adapter", "40,000 patterns"),
    ("torch", "isfinite", finite, "adapter", "NaN"),
    ("torch", "isfinite", finite, "safetensors", "NaN"),
    ("torch", "isfinite", finite, "trained model", "NaN"),
    ("torch", "isfinite", finite, "uneven layers", "nan in rows"),
    (CONVERSION + "export", "_is_receipt", lambda **_: True, "sentei.json", "tokens beyond the model"),
    ("sentei.measurement.text", "_check_plain", nothing, "text", "200 MB and then a zero"),
    ("sentei.training.job", "MAX_YAML_BYTES", ENDLESS, "YAML of sentei train", "400,000 lists"),
    ("sentei.training.checkpoints", "member", joined, "checkpoint", "tensors that are a link elsewhere"),
    ("sentei.circuit.file", "_check_connections", nothing, "trace", "1,000 layers of rows without choosers"),
)


def without(module: str, name: str, replacement: object, work: Callable) -> Callable:
    """`work` in a process that has lost a guard."""
    def run(path: Path) -> None:
        owner = importlib.import_module(module)
        *inner, last = name.split(".")
        for part in inner:
            owner = getattr(owner, part)
        setattr(owner, last, replacement)
        work(path)
    return run


def main() -> None:
    """Does them all."""
    folder = Path(sys.argv[1]).resolve()
    for name in ("home", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ.update(HOME=str(folder / "home"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.chdir(folder / "work")
    import torch
    from attacks.table import DOORS

    torch.set_num_threads(1)
    doors, targets, place = {door.name: door for door in DOORS}, {}, folder / "case"
    for module, guard, replacement, name, attack in GUARDS:
        door, harmless = doors[name], folder / "harmless" / name
        if name not in targets:
            targets[name] = door.make(harmless).relative_to(harmless)
            door.open(harmless / targets[name])
        shutil.copytree(harmless, place, symlinks=True)
        path = door.attacks[attack](place / targets[name]) or place / targets[name]
        before = guarded.listing(folder)
        told = guarded.forked(without(module, guard, replacement, door.open), path, folder)
        changed = sorted(item for item, _ in before.items() ^ guarded.listing(folder).items())
        about = {"guard": f"{module}.{guard}", "door": name, "kind": "attack", "name": attack, "changed": changed}
        print(json.dumps(about | told), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
