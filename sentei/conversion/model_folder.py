"""A folder with a model in it, as Hugging Face lays it out, checked before anything else opens it."""

import re
import stat
from pathlib import Path

from sentei.conversion.families import family_of, unmarked
from sentei.conversion.family import Family
from sentei.core.errors import FileError, UnsupportedError, shown
from sentei.core.safetensors_header import Tensor, read_header
from sentei.core.storage import json_bytes, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".npy", ".h5", ".msgpack")
MAX_CONFIG_BYTES = 1 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 36 << 20  # transformers parses it too, where a character may take four bytes twice
MAX_TENSORS = 1 << 16  # in all files together
# transformers opens whatever lies in it and ends in .jinja.
_TEMPLATES = "additional_chat_templates"
_LOADABLE = ("F64", "F32", "F16", "BF16")
# Keys that would make transformers look outside the folder, or for code; it merges the map of tokens into the settings.
_TOKENIZER_KEYS = ("auto_map", "trust_remote_code", "fast_tokenizer_files", "init_inputs", "tokenizer_file",
                   "vocab_file", "merges_file", "gguf_file", "tokenizer_object", "from_slow")
_GENERATION_KEYS = ("auto_map", "trust_remote_code", "custom_generate")


def refuse_pickle(path: Path) -> None:
    """Raises FileError when `path` is named like weights that can hold code."""
    if path.suffix.lower() in PICKLES:
        raise FileError(
            str(path), expected="safetensors or GGUF weights", got=f"a {path.suffix} file, which sentei never opens",
            do="convert it where you trust it: load it with transformers and call model.save_pretrained(folder)")


def member(folder: Path, name: str, *, required: bool = True) -> Path | None:
    """The regular file `name` inside `folder`, or None when it is absent and not required.

    A link may stay inside the folder or lead to the blobs of the Hugging Face cache that the folder belongs to.

    Raises:
        FileError: a name with a separator, a link that leads elsewhere, a device or pipe, or a required file missing.
    """
    path = folder / name
    if name in ("", ".", "..") or any(part in name for part in ("/", "\\", "\0")):
        raise FileError(str(folder), expected="file names without folders", got=shown(name),
                        do="use a model whose index names files in its own folder")
    try:
        mode = path.stat().st_mode
        real, root = path.resolve(), folder.resolve()
    except OSError as error:
        if not required and isinstance(error, FileNotFoundError) and not path.is_symlink():
            return None
        raise FileError(str(path), expected="a file that can be read", got=str(error.strerror or error),
                        do="download the model again") from error
    roots = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not stat.S_ISREG(mode) or not any(real.is_relative_to(allowed) for allowed in roots):
        raise FileError(str(path), expected="a regular file inside the model's folder",
                        got="a link that leads elsewhere" if stat.S_ISREG(mode) else "something that is not a file",
                        do="copy the file into the folder")
    return path


def read_config(folder: Path) -> tuple[dict, Family]:
    """The parsed and checked config.json of `folder`, and the family it names.

    Raises:
        FileError, UnsupportedError: see `member`, `storage.read_json` and `families.family_of`.
    """
    if member(folder, "adapter_config.json", required=False) is not None:
        raise UnsupportedError(str(folder), expected="a whole model", got="an adapter (adapter_config.json)",
                               do="merge the adapter into its base model first (peft: merge_and_unload)")
    if member(folder, "config.json", required=False) is None:
        raise FileError(str(folder), expected="a model folder with config.json", got="a folder without it",
                        do="give the folder that holds config.json, or a .gguf file")
    raw = unmarked(read_json(folder / "config.json", MAX_CONFIG_BYTES))
    return raw, family_of(raw, str(folder / "config.json"))


def weight_files(folder: Path, family: Family | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors of each weight file of `folder`, from headers alone.

    Args:
        family: tensors that its models leave in a file are left out.
    Raises:
        FileError: see `weight_headers`.
        UnsupportedError: weights in a quantised or integer type.
    """
    files = weight_headers(folder)
    if family is not None:
        files = {file: {name: tensor for name, tensor in tensors.items() if family.own_name(name)}
                 for file, tensors in files.items()}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if tensor.dtype not in _LOADABLE:
                raise UnsupportedError(str(folder / file), expected=f"weights in {', '.join(_LOADABLE)}",
                                       got=f"{tensor.dtype} for {shown(name)}", do="use an unquantised version")
    return files


def weight_headers(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each weight file of `folder`, whatever their dtype.

    `model.safetensors` wins over an index, as in transformers.

    Raises:
        FileError: no safetensors weights, a malformed header or index, a tensor in two files or not where the index
            says.
    """
    if member(folder, WEIGHTS, required=False) is not None:
        files = {WEIGHTS: read_header(folder / WEIGHTS)}
    elif member(folder, INDEX, required=False) is not None:
        files = _indexed(folder)
    else:
        raise _no_weights(folder)
    seen: set[str] = set()
    for file, tensors in files.items():
        for name in tensors:
            if name in seen:
                raise FileError(str(folder / file), expected="every tensor once", got=f"{shown(name)} in two files",
                                do="download the model again")
            seen.add(name)
    return files


def _indexed(folder: Path) -> dict[str, dict[str, Tensor]]:
    where = folder / INDEX
    placed = read_json(where).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(
            isinstance(file, str) and file.endswith(".safetensors") for file in placed.values()):
        raise FileError(str(where), expected="a weight_map from tensors to safetensors files", got=shown(placed),
                        do="download the model again")
    shards = sorted(set(placed.values()))
    for shard in shards:
        member(folder, shard)
    files: dict[str, dict[str, Tensor]] = {}
    for shard in shards:
        files[shard] = read_header(folder / shard)
        if sum(map(len, files.values())) > MAX_TENSORS:
            raise FileError(str(where), expected=f"at most {MAX_TENSORS:,} tensors", got="more",
                            do="check that this is the model you meant")
    for name, shard in placed.items():
        if name not in files[shard]:
            raise FileError(str(where), expected="tensors where the index says", got=f"no {shown(name)} in {shard}",
                            do="download the model again")
    return files


def _no_weights(folder: Path) -> FileError:
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if others:
        return FileError(
            str(folder), expected=WEIGHTS, got=f"only {shown(others[0])}, which sentei never opens",
            do="convert it where you trust it: load it with transformers and call model.save_pretrained(folder)")
    return FileError(str(folder), expected=f"{WEIGHTS} or {INDEX}", got="neither", do="download the model again")


def check_side_files(folder: Path) -> None:
    """Checks the tokenizer's and the generation settings' files of `folder` without building anything.

    Raises:
        FileError: no tokenizer.json; a file too large, malformed or not inside the folder; a key that leads to code or
            out of the folder; chat templates in a folder of their own.
    """
    json_bytes(member(folder, "tokenizer.json"), MAX_TOKENIZER_BYTES)
    if (folder / _TEMPLATES).is_dir():
        raise FileError(str(folder / _TEMPLATES), expected="one chat template, in chat_template.jinja",
                        got="a folder of them", do="remove that folder: sentei needs no chat template")
    template = member(folder, "chat_template.jinja", required=False)
    if template is not None and template.stat().st_size > MAX_TEMPLATE_BYTES:
        raise FileError(str(template), expected=f"at most {MAX_TEMPLATE_BYTES:,} bytes",
                        got=f"{template.stat().st_size:,}", do="check that this is the file you meant")
    # transformers looks for it, and opens it only where tokenizer.json is missing.
    member(folder, "tokenizer.model", required=False)
    for name, refused in (("tokenizer_config.json", _TOKENIZER_KEYS), ("special_tokens_map.json", _TOKENIZER_KEYS),
                          ("added_tokens.json", ()), ("generation_config.json", _GENERATION_KEYS)):
        if member(folder, name, required=False) is None:
            continue
        values = read_json(folder / name)
        for key in refused:
            if values.get(key):
                raise FileError(str(folder / name), expected="settings only", got=f"the key {key!r}",
                                do="use a model that needs no code of its own")
        _check_templates(folder / name, values.get("chat_template"))


def _check_templates(path: Path, templates: object) -> None:
    """Raises FileError unless a chat template is text, or several have plain names: each becomes a file when saved."""
    several = isinstance(templates, list) and all(isinstance(one, dict) for one in templates)
    named = [(one.get("name"), one.get("template")) for one in templates] if several else [("default", templates)]
    for name, template in named if templates is not None else []:
        plain = isinstance(name, str) and re.fullmatch(r"\w{1,64}", name, flags=re.ASCII)
        if not plain or not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES:
            raise FileError(str(path), expected=f"chat templates with plain names, of at most {MAX_TEMPLATE_BYTES:,} "
                            "characters", got=shown(name), do="remove chat_template: sentei needs none")
