"""Tiny random models of every family, and a tokenizer to go with them."""

import struct
from pathlib import Path

import torch

from sentei.conversion.families import named

VOCABULARY = 320
SPECIAL = ("<unk>", "<s>", "</s>")
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
_OWN = {
    "llama": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
                  "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16,
                  "norm_topk_prob": True},
}


def tiny_config(model_type: str, **overrides):
    """The transformers config of a tiny model: 3 layers, 4 heads, 2 key/value heads of size 16."""
    import transformers

    return getattr(transformers, named(model_type).config)(**_SHAPE | _OWN[model_type] | overrides)


def tiny_model(model_type: str, **overrides):
    """A tiny random model, float32, eval mode, sdpa; the weights are the same on every call."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, named(model_type).architecture)._from_config(
            tiny_config(model_type, **overrides), attn_implementation="sdpa", dtype=torch.float32)
    return model.eval()


def tiny_tokenizer(**names):
    """A byte-level fast tokenizer: three special tokens, which can be named anew, then one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"} | names)


def save_tiny(folder: Path, model_type: str, **overrides) -> Path:
    """Writes config.json, model.safetensors and the tokenizer of a tiny model into `folder`, and returns it."""
    tiny_model(model_type, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_encoder(head: str = "BertModel", **overrides):
    """A tiny random BERT, float32, eval mode, its biases not zero; the weights are the same on every call."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        kind = getattr(transformers, head)
        own = {"add_pooling_layer": False} if head == "BertModel" else {}
        model = kind._from_config(transformers.BertConfig(**sizes | overrides), attn_implementation="sdpa", **own)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=model.config.initializer_range)
        return model.eval()


def save_tiny_encoder(folder: Path, head: str = "BertModel", **overrides) -> Path:
    """Writes a tiny BERT, with that head, and a tokenizer as encoders have it into `folder`, and returns it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(cls_token="<s>", sep_token="</s>", bos_token=None, eos_token=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tiny_encoder(head, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gguf_bytes(values: dict, tensors: dict[str, tuple[tuple[int, ...], int, int, bytes]], *, version: int = 3) -> bytes:
    """A GGUF file of text, int, float and list-of-text `values` and of tensors {name: (shape, type, offset, data)}.

    What is said is what is written, true or not, so that tests can lie.
    """
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list) and isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        if isinstance(value, list):
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(text(key) + typed(value) for key, value in values.items())
    for name, (shape, kind, offset, _) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
    body = head + bytes(-len(head) % 32)
    for _, _, _, data in tensors.values():
        body += data + bytes(-len(data) % 32)
    return body


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}


def save_tiny_gguf(path: Path, architecture: str, **values) -> torch.nn.Module:
    """Writes a tiny model as llama.cpp would, in float32, and returns the model.

    Args:
        architecture: llama.cpp's name: llama, qwen2, qwen3 or gemma3.
        values: further key-value pairs, e.g. {"llama.rope.scaling.type": "linear"}.
    """
    model_type = "gemma3_text" if architecture == "gemma3" else architecture
    sizes = {"num_hidden_layers": 6} | ({"layer_types": None} if model_type == "gemma3_text" else {})
    model = tiny_model(model_type, **sizes, **({"query_pre_attn_scalar": 256} if model_type == "gemma3_text" else {}))
    config, tensors, offset = model.config, {}, 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        known = _GGUF_NAMES.get(module) or _GGUF_NAMES.get(leaf) or (
            "post_attention_norm" if architecture == "gemma3" else "ffn_norm")
        if architecture == "gemma3" and "norm" in name:
            tensor = tensor + 1
        if architecture == "llama" and leaf in ("q_proj", "k_proj"):
            tensor = tensor.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)  # heads of 16: two halves of 8
        layer = f"blk.{module.split('.')[2]}." if ".layers." in module else ""
        data = tensor.contiguous().numpy().tobytes()
        tensors[f"{layer}{known}.{suffix}"] = (tuple(tensor.shape), 0, offset, data)
        offset += len(data) + -len(data) % 32
    tokens = tiny_tokenizer().convert_ids_to_tokens(range(len(tiny_tokenizer())))
    # Readers want merges, and more than one; these join tokens that no text contains.
    merged = ["[unused0][unused1]", "[unused2][unused3]"]
    tokens += [f"[unused{index}]" for index in range(VOCABULARY - len(tokens) - len(merged))] + merged
    shape = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
             "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
             "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
             "attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    if architecture == "gemma3":
        shape |= {"attention.sliding_window": config.sliding_window, "rope.freq_base": 1e6}
    path.write_bytes(gguf_bytes(
        {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in shape.items()},
         "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
         "tokenizer.ggml.merges": ["[unused0] [unused1]", "[unused2] [unused3]"],
         "tokenizer.ggml.token_type": [3] * 3 + [1] * (VOCABULARY - 3), "tokenizer.ggml.bos_token_id": 1,
         "tokenizer.ggml.eos_token_id": 2, **values}, tensors))
    return model
