"""Tiny models whose experts are stacked weights: two families of transformers, and our own."""

import torch
import transformers
from torch import nn

from sentei.axes.experts import Config as Room
from sentei.axes.experts.gates import Renormalised
from sentei.core.rules import TopK
from sentei.model import Config, Routed, Transformer

_SHAPE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
          "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OWN = {"Mixtral": {"num_local_experts": 5}, "Olmoe": {"num_experts": 5},
        "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 24,
                     "decoder_sparse_step": 1},
        "GptOss": {"num_local_experts": 5, "head_dim": 8}}
TOKENS = torch.arange(34).view(2, 17) % 96 + 3


def stacked(family: str) -> nn.Module:
    """A tiny random model, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "sentei":
            routed = Routed(neurons=40, room=Room(rule=TopK(2), gate=Renormalised(), unit=8))
            return Transformer(Config(width=16, layers=2, heads=(2, 2), feed_forward=routed)).eval()
        config = getattr(transformers, f"{family}Config")(**_SHAPE | _OWN[family])
        return getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=torch.float32).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits
