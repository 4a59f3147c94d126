"""Encoders of transformers, read to be looked at: those of BERT's architecture, as MiniLM.

No plan converts them; `sentei trace` shows what of them holds the mass. The same holds as for the other models: no code
from a file is run, no pickle is opened, and keys, sizes and shapes are checked before memory is taken. Only the encoder
is read: a pooler, and heads for a task, are left where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sentei.conversion.families import FAMILIES, NOT_PASSED, Family, family_of
from sentei.conversion.memory import require_memory
from sentei.conversion.model_folder import MAX_CONFIG_BYTES, WEIGHTS, check_side_files, member
from sentei.core.errors import FileError, UnsupportedError, shown
from sentei.core.safetensors_header import Tensor, read_header
from sentei.core.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEYS = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id",
})
# Said by published files, and of no consequence for the encoder.
_IGNORED = frozenset({
    "position_embedding_type", "is_decoder", "add_cross_attention", "use_cache", "classifier_dropout",
    "gradient_checkpointing", "id2label", "label2id", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "directionality",
})
_ONLY = {"position_embedding_type": ("absolute", None), "is_decoder": (False, None),
         "add_cross_attention": (False, None)}
_ARCHITECTURES = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification",
                  "BertForTokenClassification", "BertForQuestionAnswering")
_LEFT = ("pooler.", "cls.", "classifier.", "qa_outputs.", "embeddings.position_ids")
_FLOATS = ("F64", "F32", "F16", "BF16")
ENCODERS: dict[str, Family] = {
    "bert": replace(FAMILIES["llama"], model_type="bert", architecture="BertModel", config="BertConfig",
                    attention="BertSelfAttention", config_keys=_KEYS | _IGNORED | NOT_PASSED)}


def is_encoder(folder: Path) -> bool:
    """Whether the config.json of a folder names an encoder of ENCODERS; nothing else is looked at.

    Raises:
        FileError: a config.json that cannot be read.
    """
    if not folder.is_dir() or member(folder, "config.json", required=False) is None:
        return False
    kind = read_json(folder / "config.json", MAX_CONFIG_BYTES).get("model_type")
    return isinstance(kind, str) and kind in ENCODERS


def load(folder: Path) -> PreTrainedModel:
    """The encoder of a folder on the CPU, float32, in eval mode.

    Raises:
        FileError: settings, tensors or files that are missing, malformed or not to be trusted; weights not finite.
        UnsupportedError: a decoder, other positions than absolute ones, another head, or quantised weights.
        ResourceError: less memory available than the weights take.
    Cost: one copy of the weights.
    """
    import transformers
    from safetensors import SafetensorError

    config = _config(folder)
    check_side_files(folder)
    tensors = read_header(member(folder, WEIGHTS))
    try:
        with torch.device("meta"):
            model = transformers.BertModel(config, add_pooling_layer=False)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise FileError(str(folder / "config.json"), expected="the settings of a bert model", got=shown(error),
                        do="download the file again from where it was published") from error
    _check_tensors(folder, {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, tensors)
    require_memory(folder, 4 * sum(tensor.elements for tensor in tensors.values()))
    try:
        with _without_report():
            model = transformers.BertModel.from_pretrained(
                str(folder), config=config, add_pooling_layer=False, dtype=torch.float32, attn_implementation="sdpa",
                local_files_only=True, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FileError(str(folder), expected="weights that transformers can load", got=shown(error),
                        do="download the model again") from error
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FileError(str(folder), expected="finite weights", got=f"NaN or infinity in {name}",
                            do="download the model again")
    return model.eval()


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers reports what it leaves in the file; that is meant, and has been checked."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _config(folder: Path):
    """The checked settings, as transformers' object."""
    where = str(folder / "config.json")
    raw = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    for key, values in _ONLY.items():
        if key in raw and not any(raw[key] is value or raw[key] == value for value in values):
            raise UnsupportedError(where, expected=f"{key!r} absent or one of {list(values)}", got=shown(raw[key]),
                                   do="trace an encoder with absolute positions")
    named = raw.pop("architectures", None)
    if named is not None and not (isinstance(named, list) and len(named) == 1 and named[0] in _ARCHITECTURES):
        raise UnsupportedError(where, expected=f"architectures one of {', '.join(_ARCHITECTURES)}", got=shown(named),
                               do="trace an encoder of one of these")
    family = family_of(raw, where, ENCODERS)
    return family.build_config({key: value for key, value in raw.items() if key in _KEYS | {"model_type"}}, where)


def _check_tensors(folder: Path, expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """The encoder's tensors, whether or not they stand under `bert.`, are there, floating and of the right shape."""
    plain = {name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
             .replace("LayerNorm.beta", "LayerNorm.bias"): tensor for name, tensor in tensors.items()}
    left = {name for name in plain if name.startswith(_LEFT)}
    missing, surplus = sorted(expected.keys() - plain.keys()), sorted(plain.keys() - left - expected.keys())
    for problem, names in (("missing", missing), ("not in the encoder", surplus)):
        if names:
            raise FileError(str(folder), expected="the tensors that config.json describes",
                            got=f"{len(names)} {problem}, first {shown(names[0])}", do="download the model again")
    for name, shape in expected.items():
        if plain[name].shape != shape or plain[name].dtype not in _FLOATS:
            raise FileError(str(folder), expected=f"{name} of shape {shape}, in {', '.join(_FLOATS)}",
                            got=f"{plain[name].shape}, {plain[name].dtype}", do="download the model again")
