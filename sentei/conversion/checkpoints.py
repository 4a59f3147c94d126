"""Pretrained models: found, checked before memory is taken, and loaded without running anything they contain.

Safetensors, JSON and GGUF are read; pickles never are. The hub is asked only when the caller says `online=True`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sentei.conversion import embedded
from sentei.conversion.card import CARD, licence_in
from sentei.conversion.family import Family
from sentei.conversion.gguf_cache import dequantise
from sentei.conversion.memory import require_memory
from sentei.conversion.model_folder import check_side_files, member, read_config, refuse_pickle, weight_files
from sentei.conversion.tokenizers import read_tokenizer
from sentei.core.errors import FileError, SenteiError, shown
from sentei.core.machine import cache_folder
from sentei.core.storage import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
              "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja", CARD)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder that has passed every check which needs no weights in memory.

    Args:
        folder: where config.json, the safetensors weights and the tokenizer are.
        name: a short name for reports.
        source: where the weights come from, in words.
        family: the row of `FAMILIES` it belongs to.
        fingerprint: 64 hexadecimal digits that change when the config, the weights or the tokenizer do.
        licence: the word for it beside or in the weights, or None.
    """

    folder: Path
    name: str
    source: str
    family: Family
    fingerprint: str
    licence: str | None = None


def locate(model: str | None = None, *, online: bool = False, cache: Path | None = None) -> Checkpoint:
    """Finds and checks a model: a folder, a .gguf file, None or "default" for the embedded one, or a hub id.

    The name is decided before anything is looked for: a folder called default is "./default". The hub is asked with
    `online` alone. Costs one SHA-256 pass over the weights (about one second a gigabyte); a GGUF file is converted on
    first use, see `gguf_cache.dequantise`.

    Args:
        cache: where converted GGUF files are kept; by default ~/.cache/sentei.
    Raises:
        FileError: nothing there, or files that are malformed, incomplete or not to be trusted.
        UnsupportedError: a model of another family.
        ResourceError: no room for the conversion of a GGUF file.
    """
    cache = cache_folder() if cache is None else cache
    if embedded.means(model):
        version = embedded.package().version
        return _from_gguf(embedded.path(), cache, f"package {embedded.PACKAGE} {version}, ")
    # These functions of os.path answer where those of Path raise: a name that is too long, a home of nobody.
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        folder = path.resolve()
        return _from_folder(folder, folder.name, f"{folder.name} (a local folder)")
    if os.path.exists(path):
        refuse_pickle(path)
        if path.suffix.lower() != ".gguf" or not path.is_file():
            raise FileError(str(path), expected="a model folder or a .gguf file", got="something else",
                            do="give the folder that holds config.json and the weights")
        return _from_gguf(path, cache, "")
    if not _HUB_ID.fullmatch(model):
        raise FileError(shown(model), expected="a model folder or a .gguf file", got="nothing at this path",
                        do="check the path")
    if not online:
        raise FileError(model, expected="a model folder or a .gguf file", got="nothing at this path",
                        do="check the path, or add --online if this is a model on the Hugging Face hub")
    folder = _download(model)
    return _from_folder(folder, model.rpartition("/")[2], f"{model} (Hugging Face hub, revision {folder.name})")


def load_model(checkpoint: Checkpoint, dtype: str = "float32", reshape: Callable | None = None) -> PreTrainedModel:
    """The model on the CPU, in eval mode, with transformers' own "sdpa" attention.

    Costs 0.4 s for 135 million weights once the file is in the page cache; memory is one copy of the weights in
    `dtype` and the largest tensor once more.

    Args:
        dtype: "float32" or "bfloat16".
        reshape: gives the model that config.json describes the shapes that its weights have, in place; it then takes
            the time of setting weights at random too.
    Raises:
        FileError: tensors missing, surplus or of another shape than config.json says; NaN or infinite weights.
        ResourceError: less memory available than the weights take.
    """
    if dtype not in DTYPES:
        raise SenteiError("dtype", expected=f"one of {', '.join(DTYPES)}", got=shown(dtype), do="choose one of them")
    import transformers
    from safetensors import SafetensorError

    folder = checkpoint.folder
    raw, family = read_config(folder)
    config = family.build_config(raw, str(folder / "config.json"))
    tensors = {name: tensor for file in weight_files(folder, family).values() for name, tensor in file.items()}
    model_class = getattr(transformers, family.architecture)
    check_side_files(folder)
    shapes = family.check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()},
                                  str(folder / "config.json"), reshape)
    size = DTYPES[dtype].itemsize
    sizes = *(tensor.bytes for tensor in tensors.values()), *(math.prod(shape) * size for shape in shapes.values())
    require_memory(folder, sum(tensor.elements for tensor in tensors.values()) * size + max(sizes))
    if reshape is not None:
        model = _reshaped(folder, model_class._from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa",
                                                           **family.options), reshape)
        _check_finite(folder, model)
        return model.eval()
    try:
        with _without_report():
            model, info = model_class.from_pretrained(
                str(folder), config=config, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True,
                use_safetensors=True, trust_remote_code=False, output_loading_info=True, **family.options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FileError(str(folder), expected="weights that transformers can load", got=shown(error),
                        do="download the model again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = [name for name in info[problem] if problem != "unexpected_keys" or family.own_name(name)]
        if names:
            raise FileError(str(folder), expected="exactly the tensors of the model",
                            got=f"{problem.replace('_', ' ')}: {shown(sorted(names))}", do="download the model again")
    _check_finite(folder, model)
    return model.eval()


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers reports what it leaves in the file; that is meant, and is checked."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _reshaped(folder: Path, model: PreTrainedModel, reshape: Callable) -> PreTrainedModel:
    """The model with other shapes and the folder's weights, whose names and shapes have been checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    reshape(model)
    own = model.state_dict()  # what a room chooses by stays in fp32, whatever the weights are in
    try:
        state = {name: tensor.to(own.get(name, tensor).dtype) for file in weight_files(folder)
                 for name, tensor in load_file(folder / file).items()}
        missing, surplus = model.load_state_dict(state, strict=False, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FileError(str(folder), expected="weights of the shapes that sentei.json says", got=shown(error),
                        do="write the folder again with sentei prune") from error
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(missing) - tied or surplus:
        raise FileError(str(folder), expected="exactly the tensors of the model",
                        got=shown(sorted([*missing, *surplus])), do="write the folder again with sentei prune")
    model.tie_weights()
    return model


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The fast tokenizer described by tokenizer.json (0.3 s for a vocabulary of 50,000).

    Raises:
        FileError: tokenizer.json is missing, or a file of the tokenizer is malformed or names code.
    """
    return read_tokenizer(checkpoint.folder)


def _from_gguf(path: Path, cache: Path, origin: str) -> Checkpoint:
    folder, header, done = dequantise(path, cache)
    _, family = read_config(folder)
    weight_files(folder, family)
    kind = header.quantisation
    name = re.sub(rf"[.-]{kind}(_[A-Z]+)?$", "", path.stem, flags=re.IGNORECASE)
    licence = header.values.get("general.license")
    return Checkpoint(folder=folder, name=name, family=family, licence=licence if isinstance(licence, str) else None,
                      source=f"{name} ({origin}GGUF {kind} de-quantised to {done['dtype']})",
                      fingerprint=hashlib.sha256(f"gguf {done['format']} {done['gguf']}".encode()).hexdigest())


def _from_folder(folder: Path, name: str, source: str) -> Checkpoint:
    _, family = read_config(folder)
    files = ["config.json", "tokenizer.json", *weight_files(folder, family)]
    check_side_files(folder)
    if member(folder, "tokenizer_config.json", required=False) is not None:
        files.append("tokenizer_config.json")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0{sha256(folder / file)}\n".encode())
    card = member(folder, CARD, required=False)
    return Checkpoint(folder=folder, name=name, source=source, family=family, fingerprint=digest.hexdigest(),
                      licence=card and licence_in(card))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (OSError, HFValidationError) as error:  # the hub's own errors and lost connections are all OSError
        raise FileError(model, expected="a model that can be downloaded from the Hugging Face hub", got=shown(error),
                        do="check the name and the connection; a gated model needs `hf auth login`") from error


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # rooms hold what they choose by in these
        # The extremes carry a NaN or an infinity without a second tensor of the same size.
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all():
            raise FileError(str(folder), expected="finite weights", got=f"NaN or infinity in {name}",
                            do="download the model again")
