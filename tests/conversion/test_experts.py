"""transformers' mixtures of experts through `route`: the same logits, prefill and decode, and the same gradients."""

import pytest
import torch
import transformers

from sentei.conversion import experts
from sentei.conversion.experts import NAME, register_experts, run_experts
from sentei.core.errors import UnsupportedError
from sentei.kernels.routing import Stack

_SHAPE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
FAMILIES = {  # and whether their experts are a stack
    "Mixtral": ({"num_local_experts": 6, "num_experts_per_tok": 2}, True),
    "Olmoe": ({"num_experts": 6, "num_experts_per_tok": 2}, True),
    "Qwen2Moe": ({**_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}, True),
    "Qwen3Moe": ({**_EXPERTS, "head_dim": 8, "decoder_sparse_step": 1}, True),
    "DeepseekV3": ({"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 2,
                    "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}, True),
    "GptOss": ({"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 32}, False),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, dtype: torch.dtype = torch.float32):
    """A tiny random model of the family, and tokens."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_SHAPE | FAMILIES[family][0])
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # biases and routers are made zero by some families
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randint(3, 99, (2, 17))


def switched(model, name: str):
    model.set_experts_implementation(name)
    assert model.config._experts_implementation == name
    return model


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """To what rounding may do in a few layers; in bfloat16 a router may decide otherwise for a token or two."""
    gap = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert found.shape == expected.shape and gap.isfinite().all()
    assert gap.max() < 1e-4 if dtype == torch.float32 else gap.median() < 0.03


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_logits_are_those_of_eager_in_prefill_and_decode(family, dtype, monkeypatch):
    model, tokens = model_of(family, dtype)
    kinds, own = [], experts._experts
    monkeypatch.setattr(experts, "_experts", lambda module: kinds.append(own(module)) or kinds[-1])
    register_experts()
    expected = switched(model, "eager")(tokens).logits
    assert not kinds
    near(switched(model, NAME)(tokens).logits, expected, dtype)
    assert len(kinds) == 2 and all(isinstance(kind, Stack) == FAMILIES[family][1] for kind in kinds)
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    step = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits
    near(step, expected[:, -1:], dtype)


@every_family
def test_gradients_are_those_of_eager(family):
    model, tokens = model_of(family)
    register_experts()
    every = {}
    for name in ("eager", NAME):
        model.zero_grad()
        switched(model, name)(tokens, labels=tokens).loss.backward()
        every[name] = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    assert every["eager"].keys() == every[NAME].keys()
    for path, expected in every["eager"].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(every[NAME][path], expected, rtol=1e-3, atol=1e-4 * size + 1e-8)


def test_what_other_ranks_hold_is_left_to_them():
    model, _ = model_of("Mixtral")
    module = model.model.layers[0].mlp.experts
    x, weights = torch.randn(3, 32), torch.ones(3, 2)
    module._is_expert_parallel = True
    found = run_experts(module, x, torch.tensor([[0, 6], [6, 7], [2, 1]]), weights)
    module._is_expert_parallel = False
    expected = run_experts(module, x, torch.tensor([[0, -1], [-1, -1], [2, 1]]), weights)
    assert torch.equal(found, expected) and not found[1].any()


def test_another_activation_is_noticed():
    model, _ = model_of("Mixtral")
    module = model.model.layers[0].mlp.experts
    assert experts._experts(module).activation == "silu"
    module.act_fn = torch.nn.ReLU()
    assert experts._experts(module).activation == "relu"
    module.act_fn = torch.nn.Tanh()
    assert not isinstance(experts._experts(module), Stack)


def test_registering_twice_is_no_harm_and_importing_registers_nothing(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert register_experts() == register_experts() == NAME
    assert ALL_EXPERTS_FUNCTIONS[NAME] is run_experts
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(UnsupportedError, match="experts: expected transformers with an experts interface"):
        register_experts()
