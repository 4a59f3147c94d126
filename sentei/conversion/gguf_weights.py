"""A GGUF file's tensors and settings under the names and in the layout of transformers.

llama.cpp names tensors in its own way, reorders the rows of Llama's queries and keys for its rotary embedding, and
stores Gemma's norm weights with one added. Its settings are checked like any config.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sentei.conversion.families import FAMILIES
from sentei.conversion.gguf_header import GgufHeader
from sentei.core.errors import FileError, UnsupportedError, shown

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
_GEMMA_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SETTINGS = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def settings(path: Path, header: GgufHeader) -> dict:
    """What config.json would say of this file; `families.family_of` has still to check it.

    Raises:
        UnsupportedError: an architecture sentei has no names for, or scaled rotary positions.
        FileError: no embedding, which gives the size of the vocabulary.
    """
    architecture = header.values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(str(path), expected=f"a GGUF of one of: {', '.join(ARCHITECTURES)}",
                               got=f"architecture {shown(architecture)}",
                               do="choose a model of one of these architectures")
    scaled = header.values.get(f"{architecture}.rope.scaling.type", "none") != "none"
    if scaled or any(name.startswith("rope_") for name in header.tensors):
        raise UnsupportedError(str(path), expected="rotary positions without scaling", got="scaled rotary positions",
                               do="use the safetensors folder of the same model, where config.json has the scaling")
    if "token_embd.weight" not in header.tensors:
        raise FileError(str(path), expected="the tensor token_embd.weight", got="none", do="download the file again")
    family = FAMILIES[ARCHITECTURES[architecture]]
    raw = {"model_type": family.model_type, "architectures": [family.architecture],
           "vocab_size": header.tensors["token_embd.weight"].shape[0],
           "tie_word_embeddings": "output.weight" not in header.tensors, "rope_theta": 10000.0}
    sliding = {"sliding_window": "attention.sliding_window"} if architecture == "gemma3" else {}
    names = {key: f"{architecture}.{name}" for key, name in (_SETTINGS | sliding).items()}
    names |= {key: f"tokenizer.ggml.{name}" for key, name in _TOKENS.items()}
    return raw | {key: header.values[name] for key, name in names.items() if name in header.values}


def shapes(path: Path, header: GgufHeader, raw: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by transformers' names; arguments and errors as for `weights`."""
    gemma = raw["model_type"] == "gemma3_text"
    return {_renamed(path, name, gemma): tensor.shape for name, tensor in header.tensors.items()}


def weights(path: Path, header: GgufHeader, raw: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The de-quantised tensors by transformers' names, on the CPU.

    Costs about 2 s for 135 million weights, and one copy of them in `dtype`.

    Args:
        raw: `settings`, checked.
    Raises:
        UnsupportedError: a tensor that transformers' model of this family does not have.
    """
    import numpy
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    gemma = raw["model_type"] == "gemma3_text"
    file = numpy.memmap(path, mode="r")
    tensors = {}
    for name, entry in header.tensors.items():
        target = _renamed(path, name, gemma)
        blocks = file[entry.begin:entry.end].reshape(*entry.shape[:-1], -1)
        values = dequantize(_unquantised(blocks, entry.kind), GGMLQuantizationType(entry.kind))
        tensor = torch.from_numpy(numpy.array(values, dtype=numpy.float32)).reshape(entry.shape)
        if gemma and "norm" in target:
            tensor -= 1
        if raw["model_type"] == "llama" and (match := re.search(r"\.([qk])_proj\.", target)):
            heads = raw["num_attention_heads"]
            heads = heads if match[1] == "q" else raw.get("num_key_value_heads", heads)
            if tensor.shape[0] % (2 * heads):
                raise FileError(str(path), expected=f"rows of {name} for {heads} heads", got=str(tensor.shape[0]),
                                do="download the file again")
            # Rotary pairs: the file has them side by side within a head, transformers has them half a head apart.
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        tensors[target] = tensor.to(dtype).contiguous()
    return tensors


def _unquantised(blocks, kind: int):
    import numpy

    views = {0: numpy.float32, 1: numpy.float16}  # `dequantize` wants these two by their own dtype, the rest as bytes
    return blocks.view(views[kind]) if kind in views else blocks


def _renamed(path: Path, name: str, gemma: bool) -> str:
    stem, _, suffix = name.rpartition(".")
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)", stem)
    target = (_GEMMA_LAYER if gemma else _LAYER).get(match[2]) if match else _TOP.get(stem)
    if target is None or suffix not in ("weight", "bias"):
        raise UnsupportedError(str(path), expected="the tensors of a plain decoder", got=shown(name),
                               do="use the safetensors folder of the same model")
    return f"model.layers.{match[1]}.{target}.{suffix}" if match else f"{target}.{suffix}"
