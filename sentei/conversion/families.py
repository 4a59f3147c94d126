"""The model families sentei can convert: one row each, and what their config.json may say.

A config.json is data from a stranger. Only the keys listed here reach transformers, and their values are bounded first.
"""

from __future__ import annotations

import math

from sentei.conversion.family import MIXED, NORMS, NORMS_AROUND, NOT_PASSED, Family
from sentei.conversion.mixtures import Mixture
from sentei.core.errors import FileError, UnsupportedError, shown

_DECODER_KEYS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
})

_BERT_KEYS = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id",
})
# Said by published files of encoders, and of no consequence for the encoder itself.
_BERT_NOT_PASSED = NOT_PASSED | {
    "position_embedding_type", "is_decoder", "add_cross_attention", "use_cache", "classifier_dropout",
    "gradient_checkpointing", "id2label", "label2id", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "directionality",
}

# Of what mixtures do in training, or give beside their answers.
_ROUTER_NOT_PASSED = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "max_window_layers"}

# Keys sentei understands at these values only; anything else would change the attention it replaces.
_ONLY = {
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "quantization_config": (None,),
}

# Before the names of a model whose layers differ in shape, see `marked`.
MARK, _CLASS = "sentei_", "Sentei"
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LARGEST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 30, "sliding_window": 1 << 30, "max_window_layers": 1 << 30,
    "sliding_window_pattern": 1 << 30, "no_rope_layer_interval": 1 << 30, "query_pre_attn_scalar": 1 << 20,
    "num_experts": 1 << 12, "num_local_experts": 1 << 12, "num_experts_per_tok": 1 << 12,
    "moe_intermediate_size": 1 << 20, "shared_expert_intermediate_size": 1 << 20,
}
_MAY_BE_ZERO = ("max_window_layers",)
_UNUSED = {"sliding_window": "use_sliding_window"}  # may be zero where the other key says that it is not used


def _family(model_type: str, prefix: str, *, window: str, keys: tuple[str, ...], norms: dict = NORMS) -> Family:
    return Family(model_type=model_type, architecture=f"{prefix}ForCausalLM", attention=f"{prefix}Attention",
                  network=f"{prefix}MLP", norms=norms,
                  config=f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config", window=window,
                  keys=_DECODER_KEYS | frozenset(keys))


def _mixture(model_type: str, prefix: str, mixture: Mixture, *, window: str, keys: tuple[str, ...],
             only: dict[str, tuple] | None = None) -> Family:
    return Family(model_type=model_type, architecture=f"{prefix}ForCausalLM", attention=f"{prefix}Attention",
                  network=f"{prefix}SparseMoeBlock", config=f"{prefix}Config", window=window, mixture=mixture,
                  members=MIXED, keys=_DECODER_KEYS | {mixture.number, "num_experts_per_tok", *keys}, only=only or {},
                  ignored=NOT_PASSED | _ROUTER_NOT_PASSED)


_QWEN_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
FAMILIES: dict[str, Family] = {
    "llama": _family("llama", "Llama", window="none", keys=("mlp_bias", "pretraining_tp")),
    "smollm3": _family("smollm3", "SmolLM3", window="layer_types",
                       keys=(*_QWEN_WINDOW, "mlp_bias", "pretraining_tp", "no_rope_layers", "no_rope_layer_interval")),
    "qwen2": _family("qwen2", "Qwen2", window="layer_types", keys=_QWEN_WINDOW),
    "qwen3": _family("qwen3", "Qwen3", window="layer_types", keys=_QWEN_WINDOW),
    "mistral": _family("mistral", "Mistral", window="every", keys=("sliding_window",)),
    "gemma3_text": _family("gemma3_text", "Gemma3", window="layer_types", norms=NORMS_AROUND, keys=(
        "sliding_window", "sliding_window_pattern", "layer_types", "hidden_activation", "rope_local_base_freq",
        "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")),
}

# Layers that are mixtures of experts, every one of them, as transformers stacks these.
_QWEN_MIXTURE = ("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
_EVERY_LAYER = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
MIXTURES: dict[str, Family] = {
    "mixtral": _mixture("mixtral", "Mixtral", Mixture(
        number="num_local_experts", matrices=("w1", "w3", "w2"), place="block_sparse_moe"),
        window="every", keys=("sliding_window",)),
    "olmoe": _mixture("olmoe", "Olmoe", Mixture(number="num_experts"), window="none",
                      keys=("norm_topk_prob", "clip_qkv"), only={"clip_qkv": (None,)}),
    "qwen2_moe": _mixture("qwen2_moe", "Qwen2Moe", Mixture(number="num_experts"),
                          window="layer_types", only=_EVERY_LAYER, keys=(
                              *_QWEN_WINDOW, *_QWEN_MIXTURE, "shared_expert_intermediate_size", "qkv_bias")),
    "qwen3_moe": _mixture("qwen3_moe", "Qwen3Moe", Mixture(number="num_experts"), window="every", only=_EVERY_LAYER,
                          keys=(*_QWEN_WINDOW[:2], *_QWEN_MIXTURE, "num_local_experts")),  # published, and saved
}

# Only the encoder is read: a pooler, and heads for a task, are left where they are. Its norms stand behind the sums, in
# the modules of the last linear layers.
ENCODERS: dict[str, Family] = {
    "bert": Family(
        model_type="bert", architecture="BertModel", config="BertConfig", attention="BertSelfAttention",
        network="BertIntermediate", window="none", keys=_BERT_KEYS, layers="encoder.layer", causal=False,
        places={"attention": ("attention.self", "attention.output"), "network": ("intermediate", "output")},
        norms={"attention": (), "network": ()},
        members={"q_proj": "attention.self.query", "k_proj": "attention.self.key", "v_proj": "attention.self.value",
                 "o_proj": "attention.output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense",
                 "act_fn": "intermediate.intermediate_act_fn"},
        ignored=_BERT_NOT_PASSED,
        only={"position_embedding_type": ("absolute", None), "is_decoder": (False, None),
              "add_cross_attention": (False, None)},
        architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification",
                       "BertForTokenClassification", "BertForQuestionAnswering"),
        options={"add_pooling_layer": False}, prefix="bert.",
        left=("pooler.", "cls.", "classifier.", "qa_outputs.", "embeddings.position_ids")),
}


def architectures() -> list[str]:
    """The classes of transformers that can be converted."""
    return [family.architecture for family in (FAMILIES | MIXTURES | ENCODERS).values()]


def named(model_type: object) -> Family | None:
    """The family of that name, decoder, mixture or encoder, or None."""
    return (FAMILIES | MIXTURES | ENCODERS).get(model_type) if isinstance(model_type, str) else None


def family_of(raw: dict, where: str = "config.json") -> Family:
    """The family of a config.json, after its keys and sizes have been checked; no memory is taken and nothing is run.

    Args:
        raw: the parsed file.
        where: what to call the file in an error.
    Raises:
        FileError: a key that names code, a private or unknown key, a size missing or out of bounds.
        UnsupportedError: another family, another head, quantised weights, or a setting sentei has no kernel for.
    """
    for key in _CODE_KEYS:
        if key in raw:
            raise FileError(where, expected="settings only", got=f"the key {key!r}, which names code to run",
                            do="use a model whose architecture is part of transformers; "
                               "sentei never runs code from a model")
    _check_values_of(_ONLY, raw, where)
    family = named(raw.get("model_type"))
    if family is None:
        raise _unsupported(where, f"model_type {shown(raw.get('model_type'))}")
    _check_values_of(family.only, raw, where)
    said = raw.get("architectures")
    if said is not None and said not in [[name] for name in family.architectures or (family.architecture,)]:
        raise _unsupported(where, f"architectures {shown(said)} with model_type {family.model_type}")
    for key in sorted(raw.keys() - family.keys - family.ignored - _ONLY.keys()):
        kind = "the private key" if key.startswith("_") else "the unknown key"
        raise FileError(where, expected=f"the settings of a {family.model_type} model", got=f"{kind} {shown(key)}",
                        do="remove the key if you know that it does not change the model")
    _check_sizes(raw, where)
    return family


def marked(raw: dict) -> dict:
    """The config.json of a model whose layers differ: transformers' Auto classes know nothing of its names.

    They would otherwise load it, with weights at random where it has others.
    """
    return {**raw, "model_type": f"{MARK}{raw['model_type']}",
            "architectures": [f"{_CLASS}{name}" for name in raw["architectures"]]}


def unmarked(raw: dict) -> dict:
    """As it was before `marked`; another config.json as it is."""
    kind, names = raw.get("model_type"), raw.get("architectures")
    if not isinstance(kind, str) or not kind.startswith(MARK):
        return raw
    plain = {**raw, "model_type": kind.removeprefix(MARK)}
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        plain["architectures"] = [name.removeprefix(_CLASS) for name in names]
    return plain


def _check_values_of(allowed: dict[str, tuple], raw: dict, where: str) -> None:
    for key, values in allowed.items():
        if key in raw and not any(type(raw[key]) is type(value) and raw[key] == value for value in values):
            raise UnsupportedError(where, expected=f"{key!r} absent or one of {list(values)}", got=shown(raw[key]),
                                   do="use an unquantised version of this model, as its family is in transformers")


def _check_sizes(raw: dict, where: str) -> None:
    for key in _REQUIRED:
        if key not in raw:
            raise FileError(where, expected=f"the key {key!r}", got="none",
                            do="download the file again from where it was published")
    for key, largest in _LARGEST.items():
        value = raw.get(key)
        if value is None and key not in _REQUIRED:
            continue
        smallest = 0 if key in _MAY_BE_ZERO or key in _UNUSED and raw.get(_UNUSED[key]) is False else 1
        if type(value) is not int or not smallest <= value <= largest:
            raise FileError(where, expected=f"{key!r} as a whole number between {smallest} and {largest:,}",
                            got=shown(value), do="download the file again from where it was published")
    if raw["num_attention_heads"] % (raw.get("num_key_value_heads") or 1):
        raise FileError(where, expected="num_attention_heads divisible by num_key_value_heads",
                        got=f"{raw['num_attention_heads']} and {raw['num_key_value_heads']}",
                        do="download the file again from where it was published")
    for key in ("layer_types", "no_rope_layers"):
        value, kind = raw.get(key), str if key == "layer_types" else int
        if value is not None and not (isinstance(value, list) and len(value) == raw["num_hidden_layers"]
                                      and all(isinstance(entry, kind) for entry in value)):
            raise FileError(where, expected=f"{key!r} with one entry for each layer", got=shown(value),
                            do="download the file again from where it was published")
    if not _finite(raw):
        raise FileError(where, expected="finite numbers", got="NaN or infinity",
                        do="download the file again from where it was published")


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(_finite(entry) for entry in value.values())
    if isinstance(value, list):
        return all(_finite(entry) for entry in value)
    return not isinstance(value, float) or math.isfinite(value)


def _unsupported(where: str, got: str) -> UnsupportedError:
    return UnsupportedError(where, expected=f"a causal language model of one of: {', '.join(FAMILIES | MIXTURES)}, or "
                            f"an encoder: {', '.join(ENCODERS)}", got=got, do="choose a model of one of these families")
