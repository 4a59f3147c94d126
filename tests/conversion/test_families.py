"""The whitelist: published config.json files pass, anything that could run code or change the attention does not."""

import json

import pytest
from tiny import tiny_config, tiny_model

from sentei.conversion.families import FAMILIES, MIXTURES, family_of
from sentei.core.errors import FileError, UnsupportedError, shown


def said(model_type, architecture, sizes, **more):
    """The keys that every published file has, and those of this one."""
    heads, kv_heads, layers, hidden, inner, vocabulary = sizes
    return {
        "architectures": [architecture], "model_type": model_type, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": inner, "vocab_size": vocabulary, "initializer_range": 0.02, "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False} | more


LLAMA3_ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}
PUBLISHED = {
    "Llama-2-7b": said("llama", "LlamaForCausalLM", (32, 32, 32, 4096, 11008, 32000), hidden_act="silu",
                       rope_scaling=None, max_position_embeddings=4096, pretraining_tp=1,
                       _name_or_path="meta-llama/Llama-2-7b-hf"),
    "Llama-3-8B": said("llama", "LlamaForCausalLM", (32, 8, 32, 4096, 14336, 128256), hidden_act="silu",
                       rope_scaling=None, rope_theta=500000.0, max_position_embeddings=8192, pretraining_tp=1,
                       attention_bias=False, bos_token_id=128000, eos_token_id=128001),
    "Llama-3.1-8B-Instruct": said("llama", "LlamaForCausalLM", (32, 8, 32, 4096, 14336, 128256), hidden_act="silu",
                                  rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, max_position_embeddings=131072,
                                  mlp_bias=False, attention_bias=False, eos_token_id=[128001, 128008, 128009]),
    "Llama-3.2-1B": said("llama", "LlamaForCausalLM", (32, 8, 16, 2048, 8192, 128256), head_dim=64, hidden_act="silu",
                         rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, rope_theta=500000.0, tie_word_embeddings=True,
                         max_position_embeddings=131072, mlp_bias=False, attention_bias=False, pretraining_tp=1),
    "SmolLM2-135M": said("llama", "LlamaForCausalLM", (9, 3, 30, 576, 1536, 49152), hidden_act="silu",
                         is_llama_config=True, rope_interleaved=False, rope_theta=100000, rope_scaling=None,
                         max_position_embeddings=8192, tie_word_embeddings=True, pretraining_tp=1, mlp_bias=False,
                         attention_bias=False, pad_token_id=2,
                         **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "TinyLlama-1.1B": said("llama", "LlamaForCausalLM", (32, 4, 22, 2048, 5632, 32000), hidden_act="silu",
                           rope_scaling=None, rope_theta=10000.0, max_position_embeddings=2048, pretraining_tp=1),
    "SmolLM3-3B": said("smollm3", "SmolLM3ForCausalLM", (16, 4, 36, 2048, 11008, 128256), hidden_act="silu",
                       no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, layer_types=["full_attention"] * 36,
                       max_window_layers=28, sliding_window=None, use_sliding_window=False, rope_theta=5000000.0,
                       rope_scaling=None, max_position_embeddings=65536, mlp_bias=False, attention_bias=False,
                       bos_token_id=None, eos_token_id=128012, pad_token_id=128004, pretraining_tp=2,
                       tie_word_embeddings=True),
    "Qwen2-0.5B": said("qwen2", "Qwen2ForCausalLM", (14, 2, 24, 896, 4864, 151936), hidden_act="silu",
                       rope_theta=1000000.0, max_position_embeddings=131072, max_window_layers=24,
                       sliding_window=131072, use_sliding_window=False, tie_word_embeddings=True),
    "Qwen2.5-7B-Instruct": said("qwen2", "Qwen2ForCausalLM", (28, 4, 28, 3584, 18944, 152064), hidden_act="silu",
                                rope_theta=1000000.0, max_position_embeddings=32768, max_window_layers=28,
                                sliding_window=131072, use_sliding_window=False),
    "DeepSeek-R1-Distill-Qwen-7B": said("qwen2", "Qwen2ForCausalLM", (28, 4, 28, 3584, 18944, 152064),
                                        hidden_act="silu", rope_theta=10000, max_position_embeddings=131072,
                                        max_window_layers=28, sliding_window=4096, use_sliding_window=False,
                                        use_mrope=False),
    "Qwen3-0.6B": said("qwen3", "Qwen3ForCausalLM", (16, 8, 28, 1024, 3072, 151936), head_dim=128, hidden_act="silu",
                       attention_bias=False, max_position_embeddings=40960, max_window_layers=28, rope_scaling=None,
                       rope_theta=1000000, sliding_window=None, use_sliding_window=False, tie_word_embeddings=True),
    "Mistral-7B-v0.1": said("mistral", "MistralForCausalLM", (32, 8, 32, 4096, 14336, 32000), hidden_act="silu",
                            max_position_embeddings=32768, rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-Instruct-v0.2": said("mistral", "MistralForCausalLM", (32, 8, 32, 4096, 14336, 32000),
                                     hidden_act="silu", max_position_embeddings=32768, rope_theta=1000000.0,
                                     sliding_window=None),
    "Mistral-7B-v0.3": said("mistral", "MistralForCausalLM", (32, 8, 32, 4096, 14336, 32768), hidden_act="silu",
                            max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None),
    "gemma-3-1b-it": said("gemma3_text", "Gemma3ForCausalLM", (4, 1, 26, 1152, 6912, 262144), head_dim=256,
                          hidden_activation="gelu_pytorch_tanh", attention_bias=False, attn_logit_softcapping=None,
                          final_logit_softcapping=None, cache_implementation="hybrid", query_pre_attn_scalar=256,
                          max_position_embeddings=32768, rope_local_base_freq=10000, rope_scaling=None, pad_token_id=0,
                          rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, eos_token_id=[1, 106]),
    "gemma-3-270m": said("gemma3_text", "Gemma3ForCausalLM", (4, 1, 18, 640, 2048, 262144), head_dim=256,
                         hidden_activation="gelu_pytorch_tanh", attention_bias=False, attn_logit_softcapping=None,
                         final_logit_softcapping=None, query_pre_attn_scalar=256, max_position_embeddings=32768,
                         rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0, sliding_window=512,
                         _sliding_window_pattern=6, use_bidirectional_attention=False, pad_token_id=0,
                         layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3),
    "Mixtral-8x7B-v0.1": said("mixtral", "MixtralForCausalLM", (32, 8, 32, 4096, 14336, 32000), hidden_act="silu",
                              max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None,
                              num_experts_per_tok=2, num_local_experts=8, output_router_logits=False,
                              router_aux_loss_coef=0.02),
    "OLMoE-1B-7B-0924": said("olmoe", "OlmoeForCausalLM", (16, 16, 16, 2048, 1024, 50304), hidden_act="silu",
                             max_position_embeddings=4096, rope_theta=10000.0, rope_scaling=None, clip_qkv=None,
                             attention_bias=False, norm_topk_prob=False, num_experts=64, num_experts_per_tok=8,
                             output_router_logits=False, router_aux_loss_coef=0.01, pad_token_id=1,
                             eos_token_id=50279),
    "Qwen1.5-MoE-A2.7B": said("qwen2_moe", "Qwen2MoeForCausalLM", (16, 16, 24, 2048, 5632, 151936), hidden_act="silu",
                              max_position_embeddings=8192, max_window_layers=21, rope_theta=1000000.0,
                              sliding_window=32768, use_sliding_window=False, decoder_sparse_step=1,
                              moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
                              num_experts_per_tok=4, num_experts=60, norm_topk_prob=False,
                              output_router_logits=False, router_aux_loss_coef=0.001),
    "Qwen3-30B-A3B": said("qwen3_moe", "Qwen3MoeForCausalLM", (32, 4, 48, 2048, 6144, 151936), hidden_act="silu",
                          head_dim=128, attention_bias=False, max_position_embeddings=40960, max_window_layers=48,
                          rope_scaling=None, rope_theta=1000000.0, sliding_window=None, use_sliding_window=False,
                          decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
                          num_experts=128, num_experts_per_tok=8, output_router_logits=False,
                          router_aux_loss_coef=0.001),
}
EXPERTS = {"Mixtral-8x7B-v0.1": (8, 2), "OLMoE-1B-7B-0924": (64, 8), "Qwen1.5-MoE-A2.7B": (60, 4),
           "Qwen3-30B-A3B": (128, 8)}
DECODERS = FAMILIES | MIXTURES
SLIDING = {"Mistral-7B-v0.1": (), "gemma-3-1b-it": (5, 11, 17, 23), "gemma-3-270m": (5, 11, 17)}
LLAMA = PUBLISHED["Llama-3.2-1B"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_accepted(name):
    raw = PUBLISHED[name]
    family = family_of(raw)
    config = family.build_config(raw)
    assert family.model_type == raw["model_type"] == config.model_type
    assert config.num_key_value_heads == raw["num_key_value_heads"]
    assert family.prunable_layers(config) == SLIDING.get(name, tuple(range(raw["num_hidden_layers"])))


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_is_told_by_its_config(name):
    """And no memory is taken for one of 30 billion weights."""
    raw = PUBLISHED[name]
    family = family_of(raw)
    config = family.build_config(raw)
    number, kept = EXPERTS[name]
    assert (getattr(config, family.mixture.number), config.num_experts_per_tok) == (number, kept)
    shapes = family.shapes(config)
    last = f"model.layers.{config.num_hidden_layers - 1}.mlp"
    assert shapes[f"{last}.gate.weight"] == (number, config.hidden_size)
    assert shapes[f"{last}.experts.gate_up_proj"][::2] == (number, config.hidden_size)
    assert family_of({**raw, "num_experts_per_tok": number}).build_config({**raw, "num_experts_per_tok": number})
    with pytest.raises(FileError, match=f"from 1 to the {number} experts, got {number + 1}"):
        family.build_config({**raw, "num_experts_per_tok": number + 1})


@pytest.mark.parametrize(("name", "change", "error"), [
    ("Qwen3-30B-A3B", {"mlp_only_layers": [3]}, UnsupportedError),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, UnsupportedError),
    ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, UnsupportedError),
    ("OLMoE-1B-7B-0924", {"num_experts": 1 << 20}, FileError),
    ("Mixtral-8x7B-v0.1", {"num_local_experts": 0}, FileError),
    ("Qwen1.5-MoE-A2.7B", {"sliding_window": 0, "use_sliding_window": True}, FileError),
], ids=str)
def test_a_mixture_with_other_layers_or_sizes_is_refused(name, change, error):
    with pytest.raises(error):
        family_of(PUBLISHED[name] | change)


def test_rotary_scaling_reaches_the_config():
    raw = PUBLISHED["Llama-3.1-8B-Instruct"]
    parameters = family_of(raw).build_config(raw).rope_parameters
    assert (parameters["rope_type"], parameters["factor"], parameters["rope_theta"]) == ("llama3", 8.0, 500000.0)


def test_keys_that_are_only_tolerated_are_not_passed_on():
    raw = LLAMA | {"unsloth_fixed": True, "torch_dtype": "load", "temperature": 0.5}  # torch.load is no dtype
    config = family_of(raw).build_config(raw)
    assert config.dtype is None
    assert not hasattr(config, "unsloth_fixed")


@pytest.mark.parametrize("model_type", DECODERS)
def test_what_this_transformers_saves_is_accepted(model_type, tmp_path):
    tiny_config(model_type, architectures=[DECODERS[model_type].architecture]).save_pretrained(tmp_path)
    assert family_of(json.loads((tmp_path / "config.json").read_text())) is DECODERS[model_type]


@pytest.mark.parametrize("model_type", DECODERS)
def test_table_names_the_real_classes(model_type):
    model, family = tiny_model(model_type), DECODERS[model_type]
    assert {type(layer.self_attn).__name__ for layer in model.model.layers} == {family.attention}
    assert {type(layer.mlp).__name__ for layer in model.model.layers} == {family.network}
    assert model.config.model_type == model_type == family.model_type


def test_qwen_layers_above_the_limit_slide():
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert FAMILIES["qwen2"].prunable_layers(config) == (0, 1)


@pytest.mark.parametrize(("change", "expected"), [
    pytest.param({"auto_map": {"AutoModel": "code.Model"}}, FileError, id="auto_map"),
    pytest.param({"trust_remote_code": True}, FileError, id="trust_remote_code"),
    pytest.param({"_attn_implementation_internal": "someone/kernel"}, FileError, id="private-key"),
    pytest.param({"attn_implementation": "someone/kernel"}, FileError, id="attention-from-elsewhere"),
    pytest.param({"surprise": 1}, FileError, id="unknown-key"),
    pytest.param({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, id="quantised"),
    pytest.param({"rope_interleaved": True}, UnsupportedError, id="interleaved-rotary"),
    pytest.param({"model_type": "gpt2"}, UnsupportedError, id="other-family"),
    pytest.param({"model_type": ["llama"]}, UnsupportedError, id="family-is-a-list"),
    pytest.param({"architectures": ["LlamaForSequenceClassification"]}, UnsupportedError, id="other-head"),
    pytest.param({"num_hidden_layers": 10**9}, FileError, id="layers-huge"),
    pytest.param({"hidden_size": 2**40}, FileError, id="width-huge"),
    pytest.param({"vocab_size": -1}, FileError, id="vocabulary-negative"),
    pytest.param({"num_attention_heads": 0}, FileError, id="no-heads"),
    pytest.param({"num_key_value_heads": 7}, FileError, id="heads-do-not-divide"),
    pytest.param({"hidden_size": 2048.5}, FileError, id="width-not-whole"),
    pytest.param({"hidden_size": True}, FileError, id="width-is-a-bool"),
    pytest.param({"rms_norm_eps": float("nan")}, FileError, id="nan"),
    pytest.param({"rope_scaling": {"factor": [float("inf")]}}, FileError, id="infinity-deep-inside"),
])
def test_config_is_refused(change, expected):
    with pytest.raises(expected) as error:
        family_of(LLAMA | change)
    assert error.value.exit_code == (5 if expected is UnsupportedError else 3)
    if error.value.got.startswith(("the key", "the private", "the unknown")):
        assert next(iter(change)) in error.value.got
    assert ("names code" in error.value.got) is (change.keys() <= {"auto_map", "trust_remote_code"})


def test_soft_capped_gemma_is_refused():
    for change in ({"attn_logit_softcapping": 50.0}, {"use_bidirectional_attention": True}):
        with pytest.raises(UnsupportedError):
            family_of(PUBLISHED["gemma-3-270m"] | change)


def test_layer_types_must_be_one_a_layer():
    with pytest.raises(FileError, match="one entry for each layer"):
        family_of(PUBLISHED["gemma-3-270m"] | {"layer_types": ["full_attention"]})


def test_a_missing_size_is_named():
    with pytest.raises(FileError, match="hidden_size"):
        family_of({key: value for key, value in LLAMA.items() if key != "hidden_size"})


def test_an_unsupported_model_is_told_the_list():
    with pytest.raises(UnsupportedError) as error:
        family_of(LLAMA | {"model_type": "gpt_oss"})
    assert all(name in error.value.expected for name in DECODERS)


@pytest.mark.parametrize("change", [
    pytest.param({"rms_norm_eps": "small"}, id="text-for-a-number"),
    pytest.param({"rope_scaling": {"rope_type": "llama3"}, "rope_theta": "x"}, id="rotary-settings"),
    pytest.param({"hidden_size": 2049, "head_dim": None}, id="width-not-divisible"),
])
def test_values_transformers_refuses_are_file_errors(change):
    raw = LLAMA | change
    with pytest.raises(FileError):
        family_of(raw).build_config(raw)


def test_shown_is_safe_for_a_terminal():
    assert "\x1b" not in shown("\x1b[2J" + "x" * 1000)
    assert len(shown("x" * 1000)) < 130
