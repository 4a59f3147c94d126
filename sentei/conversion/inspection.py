"""A look at any checkpoint without torch or transformers: what its headers say, and what sentei would refuse and why.

Every kind is a list of steps. A step adds facts or refuses; what the others find is still told. Nothing of a file is
run, and no tensor is read.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sentei.conversion import adapter_header, gguf_header, gguf_weights
from sentei.conversion.families import family_of
from sentei.conversion.family import Family
from sentei.conversion.model_folder import (
    MAX_CONFIG_BYTES,
    PICKLES,
    check_side_files,
    member,
    read_config,
    refuse_pickle,
    weight_files,
    weight_headers,
)
from sentei.core import trace_header
from sentei.core.errors import FileError, SenteiError, shown
from sentei.core.safetensors_header import Tensor, read_whole_header
from sentei.core.storage import read_json, regular_size, unreadable

# Those of `export` and `training`, which load torch.
POLICY, MAX_POLICY_BYTES, POLICY_SCHEMA = "sentei.json", 4 << 20, "sentei.policy/1"
RUN, CHECKPOINT_SCHEMA, TRAIN_SCHEMA = "sentei-train.json", "sentei.checkpoint/2", "sentei.train/1"
_MANIFEST = re.compile(r"checkpoint-\d{8}\.json")
MOST = 100  # values, files or checkpoints that are told
Step = Callable[[], dict]


def inspect(path: Path) -> tuple[dict, SenteiError | None]:
    """The facts about a checkpoint, JSON-able, and the first reason to refuse it, or None.

    Facts hold "kind", and where they are known "architecture", "settings", "metadata", "parameters", "bytes", "dtypes",
    "tensors" ([name, dtype, shape] each), "files", "ignored", "checked" (what was) and more of their kind. Text from
    files is escaped.

    Raises:
        FileError: nothing there, or a file that says nothing about itself.
    Cost: 0.1 s for a model of 300 tensors.
    """
    try:
        steps = _of_folder(path) if os.path.isdir(path) else _of_file(path)  # that of Path raises for a name too long
    except OSError as error:
        raise unreadable(path, error) from error
    facts: dict = {}
    refused = None
    for step in steps:
        try:
            facts |= step()
        except SenteiError as error:
            refused = refused or error
    if len(facts) < 2 and refused is not None:  # no more than its kind
        raise refused
    return facts, refused


def _of_file(path: Path) -> list[Step]:
    refuse_pickle(path)
    regular_size(path)
    with open(path, "rb") as file:
        gguf = file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
    if gguf:
        return _gguf(path)
    tensors, metadata = read_whole_header(path)
    if trace_header.KEY in metadata:
        return _trace(path, tensors, metadata[trace_header.KEY])
    return [lambda: {"kind": "safetensors file", "checked": "the header against the file"},
            lambda: {"metadata": _plain(metadata)}, lambda: _weights({path: tensors})]


def _of_folder(path: Path) -> list[Step]:
    names = {entry.name for entry in path.iterdir()}
    if adapter_header.CONFIG in names:
        return _adapter(path)
    if RUN in names or any(map(_MANIFEST.fullmatch, names)):
        return _training(path, names)
    if "config.json" in names:
        return _model(path, names)
    raise FileError(str(path), expected="a model, an adapter, or a folder of sentei prune or train",
                    got="none of their files", do="name the folder that holds config.json")


def _model(folder: Path, names: set[str]) -> list[Step]:
    """A folder as Hugging Face lays it out, and what `sentei prune` writes beside it."""
    def configured() -> dict:
        raw = read_json(member(folder, "config.json"), MAX_CONFIG_BYTES)
        return {"architecture": _safe(raw.get("model_type")), "settings": _plain(raw)}

    def weights() -> dict:
        return _weights({folder / name: tensors for name, tensors in weight_headers(folder).items()})

    def accepted() -> dict:
        raw, family = read_config(folder)
        files = weight_files(folder, family)
        if not pruned or written().get("rung") != "B":  # whose layers may be fewer than config.json says
            _check_layers(folder, family, raw["num_hidden_layers"], files)
        check_side_files(folder)
        return {"checked": "settings, headers and the files of the tokenizer; not names and shapes against the "
                           "architecture, nor values"}

    def written() -> dict:
        return read_json(member(folder, POLICY), MAX_POLICY_BYTES)

    def policy() -> dict:
        said = written()
        plan = said.get("plan")
        if said.get("schema") != POLICY_SCHEMA or not isinstance(plan, list):
            raise FileError(str(folder / POLICY), expected=f"a policy of schema {POLICY_SCHEMA}",
                            got=_safe(said.get("schema")), do="write the folder again with sentei prune")
        rooms = Counter(_safe(entry.get("room")) if isinstance(entry, dict) else "none" for entry in plan)
        return {"policy": {"entries": len(plan), "rooms": dict(rooms.most_common(MOST)),
                           "dtype": _safe(said.get("dtype")), "rung": _safe(said.get("rung")),
                           "facts": _plain(said.get("facts"))}}

    pruned = POLICY in names
    return [lambda: {"kind": "pruned model" if pruned else "model"}, configured, weights, lambda: _beside(folder),
            accepted, *([policy] if pruned else [])]


def _check_layers(folder: Path, family: Family, layers: int, files: dict[str, dict[str, Tensor]]) -> None:
    found = {match[1] for tensors in files.values() for name in tensors
             if (match := re.match(rf"{re.escape(family.layers)}\.(\d{{1,6}})\.", family.own_name(name)))}
    if found != set(map(str, range(layers))):
        raise FileError(str(folder), expected=f"tensors of the {layers:,} layers that config.json describes",
                        got=f"those of {len(found):,}", do="download the model again")


def _gguf(path: Path) -> list[Step]:
    header: list[gguf_header.GgufHeader] = []

    def read() -> dict:
        header.append(gguf_header.read_header(path))
        tensors = {name: Tensor(dtype=gguf_header.QUANTISATIONS[tensor.kind][0], shape=tensor.shape)
                   for name, tensor in header[0].tensors.items()}
        sizes = {name: tensor.end - tensor.begin for name, tensor in header[0].tensors.items()}
        values = header[0].values
        return {"architecture": _safe(values.get("general.architecture")), "metadata": _plain(values),
                **_counted(tensors, sizes), "files": {_safe(path.name): path.stat().st_size}}

    def accepted() -> dict:
        if header:
            family_of(gguf_weights.settings(path, header[0]), str(path))
        return {"checked": "the header against the file, and the settings; not the vocabulary, nor values"}

    return [lambda: {"kind": "GGUF file"}, read, accepted]


def _adapter(folder: Path) -> list[Step]:
    def configured() -> dict:
        return {"settings": _plain(read_json(member(folder, adapter_header.CONFIG), MAX_CONFIG_BYTES))}

    def weights() -> dict:
        path = member(folder, adapter_header.WEIGHTS)
        return _weights({path: read_whole_header(path)[0]})

    def accepted() -> dict:
        values, factors = adapter_header.read_values(folder), adapter_header.read_factors(folder)
        return {"base": _safe(values.get("base_model_name_or_path")), "layers": len(factors),
                "checked": "settings and names; not ranks against shapes, nor the base model, nor values"}

    return [lambda: {"kind": "adapter"}, configured, weights, lambda: _beside(folder), accepted]


def _training(folder: Path, names: set[str]) -> list[Step]:
    """What `sentei train` writes: checkpoints, and at its end a model."""
    def checkpoint(name: str) -> dict:
        said = read_json(member(folder, name))
        files = said.get("files")
        if said.get("schema") != CHECKPOINT_SCHEMA or not isinstance(files, dict) or not files:
            raise FileError(str(folder / name), expected=CHECKPOINT_SCHEMA, got=_safe(said.get("schema")),
                            do="remove it; one before it may be whole")
        for part, about in files.items():
            size = regular_size(member(folder, part))
            if not isinstance(about, dict) or size != about.get("bytes"):
                raise FileError(str(folder / part), expected="as many bytes as were written", got=f"{size:,}",
                                do="remove this checkpoint; one before it may be whole")
        return _weights({folder / part: read_whole_header(folder / part)[0] for part in files})

    def model() -> dict:
        said = read_json(member(folder, "config.json"))
        if said.get("schema") != TRAIN_SCHEMA:
            raise FileError(str(folder / "config.json"), expected=f"a model of {TRAIN_SCHEMA}",
                            got=_safe(said.get("schema")), do="name a folder that sentei train wrote")
        path = member(folder, "model.safetensors")
        return {"settings": _plain(said.get("model")), **_weights({path: read_whole_header(path)[0]})}

    manifests = sorted(filter(_MANIFEST.fullmatch, names))
    return [lambda: {"kind": "training run"},
            lambda: {"checkpoints": manifests[-MOST:],
                     "checked": "manifests, sizes and headers; not digests, nor values"},
            *([lambda: checkpoint(manifests[-1])] if manifests else []), *([model] if "config.json" in names else [])]


def _trace(path: Path, tensors: dict[str, Tensor], raw: str) -> list[Step]:
    header: dict = {}

    def read() -> dict:
        with trace_header.refusing(path):
            header.update(trace_header.parsed(raw))
        return {"settings": _plain({key: header.get(key) for key in ("kind", "model", "rule", "date", "versions")})}

    def accepted() -> dict:
        with trace_header.refusing(path):
            trace_header.check(header, tensors)
        return {"runs": [{"tokens": len(run["tokens"]), "layers": len(run["layers"])} for run in header["runs"]],
                "checked": "the header, whether the runs compare, and names and sizes of tensors; not values"}

    return [lambda: {"kind": "trace"}, read, accepted, lambda: _weights({path: tensors})]


def _weights(files: dict[Path, dict[str, Tensor]]) -> dict:
    """Facts about the tensors of several files."""
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    told = {_safe(path.name): path.stat().st_size for path in list(files)[:MOST]}
    return _counted(tensors, {name: tensor.bytes for name, tensor in tensors.items()}) | {"files": told}


def _counted(tensors: dict[str, Tensor], sizes: dict[str, int]) -> dict:
    dtypes: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        one = dtypes.setdefault(tensor.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        one["tensors"] += 1
        one["parameters"] += tensor.elements
        one["bytes"] += sizes[name]
    return {"parameters": sum(one["parameters"] for one in dtypes.values()), "bytes": sum(sizes.values()),
            "dtypes": dtypes, "tensors": [
                [_safe(name), tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()]}


def _beside(folder: Path) -> dict:
    """Files that sentei never opens or never runs."""
    never = {suffix: "never opened" for suffix in PICKLES} | {".py": "never run", ".jinja": "never rendered"}
    found = {_safe(entry.name): never[entry.suffix.lower()] for entry in sorted(folder.iterdir())
             if entry.suffix.lower() in never}
    return {"ignored": dict(list(found.items())[:MOST])} if found else {}


def _plain(values: object) -> dict[str, str]:
    """Values of a stranger, safe to show."""
    if not isinstance(values, dict):
        return {}
    return {_safe(key): _safe(value) for key, value in list(values.items())[:MOST]}


def _safe(value: object) -> str:
    """A stranger's value as printable ASCII, shortened; text without quotes."""
    return shown(value) if not isinstance(value, str) else shown(_Bare(value[:2 * MOST]))


class _Bare(str):
    """Text that stands without quotes where it is shown."""

    def __repr__(self) -> str:
        return super().__repr__()[1:-1]
