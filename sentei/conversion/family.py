"""A row of the families table: what a model of transformers is made of, and what its tensors are called.

The settings and tensors are data from a stranger: shapes are checked before memory is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sentei.conversion.mixtures import Mixture
from sentei.core.errors import FileError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Accepted because published files carry them, and dropped because they do not change what the model computes here.
NOT_PASSED = frozenset({
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "_commit_hash",
    "_sliding_window_pattern", "cache_implementation", "is_llama_config", "transformers.js_config", "unsloth_fixed",
    "unsloth_version", "rope_interleaved", "use_mrope", "max_sequence_length", "dual_chunk_attention_config",
    "temperature", "top_p", "top_k", "do_sample", "max_length", "max_new_tokens", "repetition_penalty",
    "return_dict", "output_attentions", "output_hidden_states", "unk_token_id",
})

# The two parts of a layer, and where decoders keep them; a family's own names of what is in them are in its row.
PARTS = ("attention", "network")
_PLACES = {"attention": ("self_attn",), "network": ("mlp",)}
_HEADS = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_MEMBERS = _HEADS | {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "act_fn")}
MIXED = _HEADS | {"router": "mlp.gate", "experts": "mlp.experts"}  # the members of a mixture
NORMS = {"attention": ("input_layernorm",), "network": ("post_attention_layernorm",)}
NORMS_AROUND = {"attention": ("input_layernorm", "post_attention_layernorm"),
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
        members: by the names that decoders give them, the linear layers of a layer and its activation; of a mixture
            the router and the experts.
        causal: a token sees no later one.
        ignored: more keys that config.json may hold.
        only: keys that are understood at these values alone.
        architectures: that config.json may name; by default `architecture`.
        options: of the class.
        prefix: before the names of tensors, in files that hold more than the model.
        left: how names begin of tensors that are left in the file.
        mixture: what tells of its experts, where every layer is a mixture of some.
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
    norms: dict[str, tuple[str, ...]] = field(default_factory=lambda: NORMS)
    members: dict[str, str] = field(default_factory=lambda: _MEMBERS)
    causal: bool = True
    ignored: frozenset[str] = NOT_PASSED
    only: dict[str, tuple] = field(default_factory=dict)
    architectures: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    prefix: str = ""
    left: tuple[str, ...] = ()
    mixture: Mixture | None = None

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
            FileError: transformers does not accept the values, or a token is to keep more experts than there are.
        """
        import transformers

        settings = {key: value for key, value in raw.items() if key in self.keys}
        with self._building(where):
            config = getattr(transformers, self.config)(**settings)
        if self.mixture is not None:
            self.mixture.check(config, where)
        return config

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
        name = name if self.mixture is None else self.mixture.own_name(name)
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    def check_tensors(self, config: PreTrainedConfig, found: dict[str, tuple[int, ...]], where: str,
                      reshape: Callable | None = None) -> dict[str, tuple[int, ...]]:
        """Raises FileError unless `found`, shapes by name, are the tensors of such a model; gives them as it has them.

        See `shapes`; and `Mixture.stacked` for experts.
        """
        expected, do = self.shapes(config, where, reshape), "download the model again"
        found = {name: shape for name, shape in ((self.own_name(name), shape) for name, shape in found.items()) if name}
        found = found if self.mixture is None else self.mixture.stacked(found, where)
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
        return found

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
