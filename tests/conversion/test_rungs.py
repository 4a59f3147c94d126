"""Models whose layers have changed shape, on disk: plain where they can be, with sentei.json where not."""

import json

import pytest
import torch
from alone import loaded_without_sentei
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.experts import Config as Experts
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget.calibration import calibrate
from sentei.conversion import export, native
from sentei.conversion.checkpoints import load_model, locate
from sentei.conversion.export import POLICY, RECEIPT, check, check_afresh, load
from sentei.conversion.families import FAMILIES, MIXTURES
from sentei.conversion.inspection import inspect
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Entry, Plan, convert, wanted
from sentei.conversion.rooms import WAYS
from sentei.conversion.rungs import rung_of
from sentei.conversion.sparing import SparingExperts
from sentei.core.errors import FileError, SenteiError
from sentei.core.rules import Fixed, Threshold, TopK
from sentei.kernels.native import missing

TOKENS = torch.arange(3, 83)


def drop(layer: int, part: str) -> Entry:
    return Entry(layer=layer, room="depth", config=Depth(rule=Fixed(()), part=part))


def thin(layer: int, width: int) -> Entry:
    return Entry(layer=layer, room="weights", config=Weights(rule=TopK(width), saliency="obs"))


CHOOSING = Entry(layer=1, room="connections", config=Connections(rule=Threshold(0.1), tile=(8, 4), window=2))
MERGED = tuple(Entry(layer=layer, room="heads", config=Heads(num_kv_heads=1, merge="joint")) for layer in range(3))
FEWER = Entry(layer=1, room="experts", config=Experts(rule=TopK(40), unit=1))
ROUTED = Entry(layer=2, room="experts", config=Experts(rule=TopK(3), unit=16, shared=1))
THIN = tuple(thin(layer, 64) for layer in range(3))
PLANS = {
    "A, one width": ("A", THIN), "A, fewer layers": ("A", (drop(2, "block"),)),
    "A, both": ("A", (drop(2, "block"), thin(0, 32), thin(1, 32), CHOOSING)),
    "A, fewer heads": ("A", MERGED), "A, heads and width": ("A", (*MERGED, *THIN, CHOOSING)),
    "B, heads": ("B", MERGED[:2]), "B, neurons by token": ("B", (FEWER, ROUTED, MERGED[2])),
    "B, two widths": ("B", (thin(0, 32), thin(2, 64), CHOOSING)),
    "B, parts": ("B", (drop(2, "attention"), drop(1, "network"), CHOOSING)), "C": ("C", (CHOOSING,)),
}


DROPPED = tuple(Entry(layer=layer, room="weights", config=Weights(rule=TopK(4), saliency="reap", among="experts"))
                for layer in range(3))


def skipped(family: str, layer: int) -> Entry:
    """A token of a tiny mixture skips experts."""
    config, = WAYS["experts"].options(layer_of(tiny_model(family), layer), "rule")[2:3]
    return Entry(layer=layer, room="experts", config=config)


def written(folder, family: str, plan: Plan, dtype: torch.dtype = torch.float32):
    model = tiny_model(family, **({"layer_types": ["full_attention"] * 3} if family == "gemma3_text" else {}))
    for weight in model.parameters():  # and not the rotary frequencies, which transformers keeps in fp32
        weight.data = weight.data.to(dtype)
    seen = calibrate(model, TOKENS[None], wanted(plan))
    model = convert(model, plan, seen)
    export.export(model, tiny_tokenizer(), plan, folder, tokens=TOKENS, facts={})
    return model


@pytest.mark.parametrize("name", PLANS)
def test_what_is_written_is_what_is_read(name, tmp_path, monkeypatch):
    """To the bit, where the same is chosen to run natively, whatever is faster in that moment."""
    right = native.install
    monkeypatch.setattr(native, "install", lambda model: right(model, most_rows=8, many_rows=9))
    rung, entries = PLANS[name]
    plan = Plan(entries)
    model = written(tmp_path / "out", "llama", plan)
    assert rung_of(model, plan) == rung == json.loads((tmp_path / "out" / POLICY).read_text())["rung"]
    again = load(tmp_path / "out")
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)
    assert native.is_installed(again) == native.is_installed(model) == (not missing())
    assert sum(w.numel() for w in again.parameters()) == sum(w.numel() for w in model.parameters())
    assert check(tmp_path / "out")["met"]


def test_what_was_left_dense_is_read_as_dense(tmp_path):
    model = written(tmp_path / "out", "llama", Plan())
    again = load(tmp_path / "out")
    assert not native.is_installed(again) and again.config._attn_implementation == "sdpa"
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_rung_a_is_an_ordinary_checkpoint_that_gives_the_logits_of_the_receipt(family, tmp_path):
    from transformers import AutoModelForCausalLM

    written(tmp_path, family, Plan((drop(1, "block"), thin(0, 32), thin(2, 32), MERGED[0], MERGED[2])))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    receipt = load_file(tmp_path / RECEIPT)
    with torch.no_grad():
        logits = plain(input_ids=receipt["tokens"][None], logits_to_keep=8).logits[0]
    torch.testing.assert_close(logits, receipt["logits"], rtol=0, atol=1e-4)
    assert plain.config.num_hidden_layers == 2 and plain.config.intermediate_size == 32
    assert plain.config.num_key_value_heads == 1


@pytest.mark.parametrize("family", MIXTURES)
def test_rung_a_of_a_mixture_is_an_ordinary_one_of_fewer_experts(family, tmp_path):
    """As many in each of the layers that are left; read by plain transformers, and by sentei."""
    from transformers import AutoModelForCausalLM

    plan = Plan((*DROPPED[:2], drop(2, "block"), CHOOSING))
    model = written(tmp_path, family, plan)
    assert rung_of(model, plan) == "A"
    plain, receipt = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_file(tmp_path / RECEIPT)
    assert plain.config.num_hidden_layers == 2 and plain.config.num_experts == 4
    assert [len(layer.mlp.experts.down_proj) for layer in plain.model.layers] == [4, 4]
    assert check(tmp_path)["met"] and len(load(tmp_path).model.layers[1].mlp.gate.weight) == 4
    written(tmp_path, family, Plan(plan.entries[:-1]))
    plain, receipt = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_file(tmp_path / RECEIPT)
    with torch.no_grad():
        logits = plain(input_ids=receipt["tokens"][None], logits_to_keep=8).logits[0]
    torch.testing.assert_close(logits, receipt["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, plan", [
    ("llama", (drop(1, "block"), thin(0, 32), thin(2, 32), MERGED[0], MERGED[2])), ("mixtral", DROPPED),
    ("qwen3_moe", (*DROPPED[:2], drop(2, "block"), *MERGED[:2]))], ids=["llama", "mixtral", "qwen3_moe"])
def test_rung_a_gives_the_logits_of_the_receipt_in_a_process_without_sentei(family, plan, tmp_path):
    model = written(tmp_path, family, Plan(plan))
    told = loaded_without_sentei(tmp_path)
    assert told["difference"] <= 1e-4 and not told["problems"]
    gone = {entry.layer for entry in plan if entry.room == "depth"}
    assert told["parameters"] == sum(weight.numel() for name, weight in model.named_parameters()
                                     if not any(f".layers.{layer}." in name for layer in gone))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("rung", ["A", "C"])
def test_experts_that_tokens_skip_are_all_in_an_ordinary_checkpoint(family, rung, tmp_path):
    """Of the dense model, or of one of fewer layers: without sentei none are skipped, with it they are."""
    plan = Plan((skipped(family, 0), skipped(family, 2), CHOOSING, *((drop(1, "block"),) if rung == "A" else ())))
    plan = Plan(tuple(entry for entry in plan.entries if entry is not CHOOSING)) if rung == "A" else plan
    model = written(tmp_path, family, plan)
    policy = json.loads((tmp_path / POLICY).read_text())
    assert rung_of(model, plan) == policy["rung"] == rung
    assert [entry["layer"] for entry in policy["plan"] if entry["room"] == "experts"] == [0, 1 if rung == "A" else 2]
    again = load(tmp_path)
    assert sum(isinstance(module, SparingExperts) for module in again.modules()) == 2
    torch.testing.assert_close(again(TOKENS[None]).logits, model(TOKENS[None]).logits, rtol=0, atol=1e-5)
    assert check(tmp_path)["met"]
    plain, whole = loaded_without_sentei(tmp_path), tiny_model(family)
    assert not plain["problems"] and plain["difference"] > 1e-3
    left = sum(weight.numel() for name, weight in whole.named_parameters() if rung == "C" or ".layers.1." not in name)
    assert plain["parameters"] == left


@pytest.mark.parametrize("family", MIXTURES)
def test_rung_b_of_a_mixture_is_written_and_read(family, tmp_path):
    """Experts dropped in one layer and skipped in others."""
    plan = Plan((DROPPED[1], skipped(family, 0), skipped(family, 2), CHOOSING))
    model = written(tmp_path, family, plan)
    assert rung_of(model, plan) == "B" and inspect(tmp_path)[1] is None
    again = load(tmp_path)
    torch.testing.assert_close(again(TOKENS[None]).logits, model(TOKENS[None]).logits, rtol=0, atol=1e-5)
    assert sum(w.numel() for w in again.parameters()) == sum(w.numel() for w in model.parameters())
    assert check(tmp_path)["met"]
    policy = json.loads((tmp_path / POLICY).read_text())
    policy["plan"][0]["config"]["rule"]["k"] = 5
    (tmp_path / POLICY).write_text(json.dumps(policy))
    with pytest.raises(FileError, match=r"of shape \(5, .*got \(4, "):
        load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_refuses_rung_b_which_is_inspected_and_written_again(family, tmp_path):
    from transformers import AutoModelForCausalLM

    first, second = tmp_path / "first", tmp_path / "second"
    plan = Plan((drop(1, "attention"), FEWER, ROUTED))
    written(first, family, plan)
    with pytest.raises(ValueError, match=f"sentei_{family}"):
        AutoModelForCausalLM.from_pretrained(first)
    facts, refused = inspect(first)
    assert refused is None and facts["architecture"] == f"sentei_{family}" and facts["policy"]["rung"] == "B"
    again = load(first)
    assert again.config.model_type == family
    export.export(again, tiny_tokenizer(), plan, second, tokens=TOKENS, facts={})
    assert json.loads((second / "config.json").read_text()) == json.loads((first / "config.json").read_text())
    assert check(first)["met"] and check(second)["met"]


def test_rung_b_as_it_was_written_before_loads(tmp_path):
    model = written(tmp_path, "llama", Plan((FEWER,)))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.testing.assert_close(load(tmp_path)(TOKENS[None]).logits, model(TOKENS[None]).logits, rtol=0, atol=1e-5)


def test_rung_b_without_its_policy_is_refused(tmp_path):
    written(tmp_path, "llama", Plan((drop(1, "network"),)))
    (tmp_path / POLICY).unlink()
    with pytest.raises(FileError, match="missing"):
        load_model(locate(str(tmp_path)))


@pytest.mark.parametrize("family", FAMILIES)
def test_rung_b_loads_in_every_family(family, tmp_path):
    model = written(tmp_path, family, Plan((drop(1, "attention"), thin(0, 32), drop(2, "network"), MERGED[0], FEWER)))
    again = load(tmp_path)
    torch.testing.assert_close(again(TOKENS[None]).logits, model(TOKENS[None]).logits, rtol=0, atol=1e-5)


def test_what_is_chosen_by_keeps_its_dtype_so_that_the_receipt_is_exact(tmp_path):
    model = written(tmp_path, "llama", Plan((FEWER, ROUTED)), torch.bfloat16)
    again = load(tmp_path)
    held = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == held
    assert {torch.float32, torch.bfloat16} == set(held.values())
    assert check(tmp_path)["difference"] == 0


@pytest.mark.parametrize("name", ["1.mlp.rows", "1.mlp.scale", "2.mlp.router", "2.mlp.offset"])
def test_numbers_that_are_chosen_by_are_finite(name, tmp_path):
    written(tmp_path, "llama", Plan((FEWER, ROUTED)))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.{name}"].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError, match=f"NaN or infinity in model.layers.{name}"):
        load(tmp_path)


def test_a_fresh_process_reads_rung_b(tmp_path):
    written(tmp_path, "llama", Plan(PLANS["B, two widths"][1]))
    assert check_afresh(tmp_path)["met"]


@pytest.mark.parametrize("change", [
    {"rule": {"name": "topk", "k": 48}}, {"rule": {"name": "topk", "k": 10**9}}, {"rule": {"name": "topk", "k": 0}},
    {"rule": {"name": "all"}}, {"among": "row"}], ids=str)
def test_a_policy_of_other_shapes_than_the_weights_is_refused(change, tmp_path):
    written(tmp_path, "llama", Plan((thin(0, 32),)))
    policy = json.loads((tmp_path / POLICY).read_text())
    policy["plan"][0]["config"] |= change
    (tmp_path / POLICY).write_text(json.dumps(policy))
    with pytest.raises(SenteiError):
        load(tmp_path)


def test_a_policy_that_hides_what_is_gone_is_refused(tmp_path):
    written(tmp_path, "llama", Plan((drop(1, "network"), thin(0, 32))))
    policy = json.loads((tmp_path / POLICY).read_text())
    policy["plan"] = policy["plan"][1:]
    (tmp_path / POLICY).write_text(json.dumps(policy))
    with pytest.raises(FileError, match="missing"):
        load(tmp_path)
