"""The model families sentei can convert: one row each, and what their config.json may say.

A config.json is data from a stranger. Only the keys listed here reach transformers, and their values are bounded first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sentei.core.errors import FileError, UnsupportedError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DECODER_KEYS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
})

# Accepted because published files carry them, and dropped because they do not change what the model computes here.
NOT_PASSED = frozenset({
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "_commit_hash",
    "_sliding_window_pattern", "cache_implementation", "is_llama_config", "transformers.js_config", "unsloth_fixed",
    "unsloth_version", "rope_interleaved", "use_mrope", "max_sequence_length", "dual_chunk_attention_config",
    "temperature", "top_p", "top_k", "do_sample", "max_length", "max_new_tokens", "repetition_penalty",
    "return_dict", "output_attentions", "output_hidden_states", "unk_token_id",
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
}
_MAY_BE_ZERO = ("max_window_layers",)

# The two parts of a layer, and where decoders keep them; a family's own names of what is in them are in its row.
PARTS = ("attention", "network")
_PLACES = {"attention": ("self_attn",), "network": ("mlp",)}
_MEMBERS = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {
    name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "act_fn")}
_NORMS = {"attention": ("input_layernorm",), "network": ("post_attention_layernorm",)}
_NORMS_AROUND = {"attention": ("input_layernorm", "post_attention_layernorm"),
                 "network": ("pre_feedforward_layernorm", "post_feedforward_layernorm")}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Args:
        model_type: the name in config.json.
        architecture: the class of transformers, a causal language model or an encoder.
        config: its config class.
        attention, network: the classes of its attention and feed-forward modules.
        window: where sliding-window attention is said: "none", "layer_types", or "every" (one window for all layers).
        keys: those of config.json that are passed on.
        layers: where its layers are.
        places: by part of a layer, its modules: the one that computes, and others that hold linear layers of it.
        norms: by part, the norms that stand before it and, in some families, behind it.
        members: by the names that decoders give them, the linear layers of a layer and its activation.
        causal: a token sees no later one.
        ignored: more keys that config.json may hold.
        only: keys that are understood at these values alone.
        architectures: that config.json may name; by default `architecture`.
        options: of the class.
        prefix: before the names of tensors, in files that hold more than the model.
        left: how names begin of tensors that are left in the file.
    """

    model_type: str
    architecture: str
    config: str
    attention: str
    network: str
    window: str
    keys: frozenset[str]
    layers: str = "model.layers"
    places: dict[str, tuple[str, ...]] = field(default_factory=lambda: _PLACES)
    norms: dict[str, tuple[str, ...]] = field(default_factory=lambda: _NORMS)
    members: dict[str, str] = field(default_factory=lambda: _MEMBERS)
    causal: bool = True
    ignored: frozenset[str] = NOT_PASSED
    only: dict[str, tuple] = field(default_factory=dict)
    architectures: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    prefix: str = ""
    left: tuple[str, ...] = ()

    def prunable_layers(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Indices of the layers whose attention sees the whole past; layers with a sliding window are left out.

        A model whose every layer slides (Mistral 7B v0.1) gives an empty tuple.
        """
        if self.window == "layer_types":
            return tuple(index for index, kind in enumerate(config.layer_types) if kind == "full_attention")
        if self.window == "every" and config.sliding_window is not None:
            return ()
        return tuple(range(config.num_hidden_layers))

    def build_config(self, raw: dict, where: str = "config.json") -> PreTrainedConfig:
        """The transformers config object made from the whitelisted keys of `raw`, which `family_of` has accepted.

        Raises:
            FileError: transformers does not accept the values.
        """
        import transformers

        settings = {key: value for key, value in raw.items() if key in self.keys}
        with self._building(where):
            return getattr(transformers, self.config)(**settings)

    def shapes(self, config: PreTrainedConfig, where: str = "config.json", reshape: Callable | None = None
               ) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's tensors by name; no memory is taken for them.

        The layers of a family are alike, so that one is built and stands for all, a thousand would take seconds; unless
        the model is then changed.

        Args:
            reshape: changes the model in place first.
        Raises:
            FileError: transformers cannot build a model of these settings.
        """
        import torch
        import transformers

        one = copy.deepcopy(config)
        with self._building(where), torch.device("meta"):
            if reshape is not None:
                model = getattr(transformers, self.architecture)(config, **self.options)
                reshape(model)
                return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            one.num_hidden_layers = 1
            model = getattr(transformers, self.architecture)(one, **self.options)
        first = f"{self.layers}.0."
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {name: shape for name, shape in shapes.items() if not name.startswith(first)} | {
            f"{self.layers}.{layer}.{name.removeprefix(first)}": shape for layer in range(config.num_hidden_layers)
            for name, shape in shapes.items() if name.startswith(first)}

    def own_name(self, name: str) -> str | None:
        """What the model calls a tensor of a file; None for one that is left in it.

        Checkpoints of 2023 carry the rotary frequencies, which are recomputed.
        """
        name = name.removeprefix(self.prefix)
        if name.startswith(self.left) or name.endswith("rotary_emb.inv_freq"):
            return None
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    def check_tensors(self, config: PreTrainedConfig, found: dict[str, tuple[int, ...]], where: str,
                      reshape: Callable | None = None) -> None:
        """Raises FileError unless `found`, shapes by name, are the tensors of such a model; see `shapes`."""
        expected, do = self.shapes(config, where, reshape), "download the model again"
        found = {name: shape for name, shape in ((self.own_name(name), shape) for name, shape in found.items()) if name}
        if config.tie_word_embeddings and "lm_head.weight" not in found:
            expected.pop("lm_head.weight", None)
        surplus = sorted(found.keys() - expected.keys())
        missing = sorted(expected.keys() - found.keys())
        wrong = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
        for problem, names in (("missing", missing), ("not in the model", surplus)):
            if names:
                raise FileError(where, expected="exactly the tensors that its settings describe",
                                got=f"{len(names)} {problem}, first {shown(names[0])}", do=do)
        if wrong:
            raise FileError(where, expected=f"{wrong[0]} of shape {expected[wrong[0]]}, as its settings say",
                            got=f"{found[wrong[0]]}", do=do)

    @contextmanager
    def _building(self, where: str) -> Iterator[None]:
        """Turns what transformers raises for settings it does not accept into FileError."""
        from huggingface_hub.errors import StrictDataclassError

        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError,
                StrictDataclassError) as error:
            raise FileError(where, expected=f"the settings of a {self.model_type} model", got=shown(error),
                            do="download the file again from where it was published") from error


def _family(model_type: str, prefix: str, *, window: str, keys: tuple[str, ...], norms: dict = _NORMS) -> Family:
    return Family(model_type=model_type, architecture=f"{prefix}ForCausalLM", attention=f"{prefix}Attention",
                  network=f"{prefix}MLP", norms=norms,
                  config=f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config", window=window,
                  keys=_DECODER_KEYS | frozenset(keys))


_QWEN_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
FAMILIES: dict[str, Family] = {
    "llama": _family("llama", "Llama", window="none", keys=("mlp_bias", "pretraining_tp")),
    "smollm3": _family("smollm3", "SmolLM3", window="layer_types",
                       keys=(*_QWEN_WINDOW, "mlp_bias", "pretraining_tp", "no_rope_layers", "no_rope_layer_interval")),
    "qwen2": _family("qwen2", "Qwen2", window="layer_types", keys=_QWEN_WINDOW),
    "qwen3": _family("qwen3", "Qwen3", window="layer_types", keys=_QWEN_WINDOW),
    "mistral": _family("mistral", "Mistral", window="every", keys=("sliding_window",)),
    "gemma3_text": _family("gemma3_text", "Gemma3", window="layer_types", norms=_NORMS_AROUND, keys=(
        "sliding_window", "sliding_window_pattern", "layer_types", "hidden_activation", "rope_local_base_freq",
        "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")),
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
    return [family.architecture for family in (FAMILIES | ENCODERS).values()]


def named(model_type: object) -> Family | None:
    """The family of that name, decoder or encoder, or None."""
    return (FAMILIES | ENCODERS).get(model_type) if isinstance(model_type, str) else None


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
        smallest = 0 if key in _MAY_BE_ZERO else 1
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
    return UnsupportedError(where, expected=f"a causal language model of one of: {', '.join(FAMILIES)}, or an encoder: "
                            f"{', '.join(ENCODERS)}", got=got, do="choose a model of one of these families")
