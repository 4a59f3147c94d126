"""Adapter files against PEFT itself: what one writes the other reads, and the logits are the same."""

import pytest
import torch
from stacked_models import TOKENS as EXPERT_TOKENS
from stacked_models import logits as expert_logits
from stacked_models import stacked
from tiny import tiny_model
from torch import nn

from sentei.axes.rank import Config
from sentei.conversion.adapter_files import load, write
from sentei.conversion.adapters import adapters_of, add, merge

peft = pytest.importorskip("peft")
TOKENS = torch.arange(40)[None] % 300
CASES = [("llama", {}), ("llama", {"use_rslora": True, "lora_alpha": 6}), ("qwen2", {}),
         ("llama", {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}})]
every_case = pytest.mark.parametrize("family, settings", CASES, ids=str)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def peer(family: str, settings: dict) -> nn.Module:
    """A PEFT model whose adapters do something."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1, **settings)
    model = peft.get_peft_model(tiny_model(family), config)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(part, std=0.1)
    return model


@every_case
def test_a_file_of_peft_gives_the_same_logits_here(family, settings, tmp_path):
    theirs, ours = peer(family, settings), tiny_model(family)
    plain = logits(ours)
    theirs.save_pretrained(tmp_path)
    paths = load(ours, tmp_path)
    assert len(paths) == 9 and all(adapter.config.dropout == 0.1 for adapter in adapters_of(ours).values())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(ours) - plain).abs().max() > 0.1
    merge(ours)
    theirs.merge_adapter()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


@every_case
def test_our_file_gives_the_same_logits_in_peft(family, settings, tmp_path):
    ours = tiny_model(family)
    scaling = "root" if settings.get("use_rslora") else "rank"
    add(ours, ["q_proj", "down_proj"], Config(rank=4, alpha=settings.get("lora_alpha", 8), scaling=scaling))
    add(ours, ["layers.1.self_attn.v_proj"], Config(rank=2, alpha=7.5, scaling=scaling))
    for adapter in adapters_of(ours).values():
        nn.init.normal_(adapter.b, std=0.1)
    write(ours, tmp_path)
    plain, theirs = logits(tiny_model(family)), peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    assert (logits(ours) - plain).abs().max() > 0.1
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(adapters_of(ours)) == 7


def test_gradients_are_those_of_peft(tmp_path):
    theirs, ours = peer("llama", {}), tiny_model("llama")
    theirs.save_pretrained(tmp_path)
    load(ours, tmp_path)
    for model in (theirs, ours):
        model.eval()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for path, adapter in adapters_of(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        for got, factor in ((adapter.a, layer.lora_A), (adapter.b, layer.lora_B)):
            torch.testing.assert_close(got.grad, factor["default"].weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}, {"init_lora_weights": "olora"},
                                      {"modules_to_save": ["lm_head"]}, {"lora_bias": True}], ids=str)
def test_what_peft_does_beyond_plain_lora_is_refused(settings, tmp_path):
    from sentei.core.errors import UnsupportedError

    peer("qwen2", settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="plain LoRA on linear layers"):
        load(tiny_model("qwen2"), tmp_path)


STACKS = [("Mixtral", ["experts.gate_up_proj", "experts.down_proj"], {}), ("Mixtral", ["experts.down_proj"], {}),
          ("Olmoe", ["experts.down_proj", "experts.gate_up_proj"], {"use_rslora": True, "lora_alpha": 6}),
          ("Qwen2Moe", ["layers.1.mlp.experts.gate_up_proj"], {}),
          ("Mixtral", ["experts.gate_up_proj", "experts.down_proj"],
           {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.down_proj": 7}})]
every_stack = pytest.mark.parametrize("family, targets, settings", STACKS, ids=str)


def expert_peer(family: str, targets: list[str], settings: dict) -> nn.Module:
    """A PEFT model whose experts have adapters that do something."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, **settings)
    model = peft.get_peft_model(stacked(family), config)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(part, std=0.2)
    return model.eval()


@every_stack
def test_stacks_in_a_file_of_peft_give_the_same_logits_here(family, targets, settings, tmp_path):
    theirs, ours = expert_peer(family, targets, settings), stacked(family)
    theirs.save_pretrained(tmp_path)
    paths = load(ours, tmp_path)
    assert sum("experts" in path for path in paths) == sum("lora_A" in name and "experts" in name
                                                           for name, _ in theirs.named_parameters())
    torch.testing.assert_close(expert_logits(ours), expert_logits(theirs), rtol=1e-3, atol=1e-4)
    assert (expert_logits(ours) - expert_logits(stacked(family))).abs().max() > 1e-2
    merge(ours)
    theirs.merge_adapter()
    torch.testing.assert_close(expert_logits(ours), expert_logits(theirs), rtol=1e-3, atol=1e-4)


@every_stack
def test_our_stacks_give_the_same_logits_in_peft(family, targets, settings, tmp_path):
    ours = stacked(family)
    scaling = "root" if settings.get("use_rslora") else "rank"
    add(ours, [*targets, "q_proj"], Config(rank=3, alpha=settings.get("lora_alpha", 8), scaling=scaling))
    for adapter in adapters_of(ours).values():
        nn.init.normal_(adapter.b, std=0.2)
    write(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(stacked(family), tmp_path).eval()
    torch.testing.assert_close(expert_logits(theirs), expert_logits(ours), rtol=1e-3, atol=1e-4)
    assert (expert_logits(ours) - expert_logits(stacked(family))).abs().max() > 1e-2
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(adapters_of(ours))


def test_gradients_of_stacks_are_those_of_peft(tmp_path):
    theirs, ours = expert_peer(*STACKS[0]), stacked("Mixtral")
    theirs.save_pretrained(tmp_path)
    load(ours, tmp_path)
    for model in (theirs, ours):
        model.eval()(input_ids=EXPERT_TOKENS, labels=EXPERT_TOKENS, use_cache=False).loss.backward()
    stack, layer = adapters_of(ours)["model.layers.1.mlp.experts.down_proj"], (
        theirs.base_model.model.model.layers[1].mlp.experts)
    gradient = layer.lora_A["default"].weight.grad.unflatten(0, (5, 2))
    torch.testing.assert_close(stack.a.grad, gradient, rtol=1e-3, atol=1e-6)
    gradient = layer.lora_B["default"].weight.grad.unflatten(1, (2, 5)).permute(2, 0, 1)
    torch.testing.assert_close(stack.b.grad, gradient, rtol=1e-3, atol=1e-6)
