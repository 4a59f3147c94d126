"""Adapter files: there and back, and everything in them that is refused. Against PEFT itself: test_adapter_peer.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import nn

from sentei.axes.rank import Config, LowRankStack
from sentei.conversion.adapter_files import CONFIG, WEIGHTS, load, read_settings, write
from sentei.conversion.adapters import adapters_of, add
from sentei.core.errors import FileError, UnsupportedError
from sentei.core.rules import All, TopK

PATH = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{PATH}.lora_{letter}.weight" for letter in "AB")


def adapted(**settings) -> nn.Module:
    model = tiny_model("llama")
    add(model, ["q_proj", "v_proj"], Config(**settings))
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.b)
    return model


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": getattr(adapter, name) for path, adapter in adapters_of(model).items() for name in "ab"}


@pytest.fixture
def folder(tmp_path):
    write(adapted(rank=4, alpha=12.0), tmp_path)
    return tmp_path


def edit(folder, **changes) -> None:
    value = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(value | changes))


def retensor(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 3, "alpha": 5.5, "scaling": "root", "dropout": 0.25}],
                         ids=str)
def test_there_and_back(tmp_path, settings):
    model, other = adapted(**settings), tiny_model("llama")
    write(model, tmp_path, base="the/base")
    for rule in (All(), TopK(2)):
        other = tiny_model("llama")
        assert load(other, tmp_path, rule=rule) == list(adapters_of(model)) == list(adapters_of(other))
        assert all(adapter.config == Config(**settings, rule=rule) for adapter in adapters_of(other).values())
        assert all(torch.equal(part, factors(model)[name]) for name, part in factors(other).items())
    assert {name for name, part in other.named_parameters() if part.requires_grad} == set(factors(other))
    value = json.loads((tmp_path / CONFIG).read_text())
    assert value["target_modules"] == ["q_proj", "v_proj"] and value["base_model_name_or_path"] == "the/base"
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_ranks_and_alphas_of_their_own(tmp_path):
    model = tiny_model("llama")
    add(model, ["q_proj"], Config(rank=4))
    add(model, ["layers.0.self_attn.v_proj"], Config(rank=2, alpha=3))
    write(model, tmp_path)
    value = json.loads((tmp_path / CONFIG).read_text())
    own = "model.layers.0.self_attn.v_proj"
    assert value["rank_pattern"] == {f"^{own}": 2} and value["alpha_pattern"] == {f"^{own}": 3}
    assert value["target_modules"] == [own, "q_proj"]
    other = tiny_model("llama")
    load(other, tmp_path)
    assert [(a.config.rank, a.config.alpha) for a in adapters_of(other).values()] == [(4, 16), (2, 3), (4, 16), (4, 16)]


def test_a_file_of_another_dtype_becomes_that_of_the_layers(folder):
    model = tiny_model("llama").bfloat16()
    load(model, folder)
    name = f"{PATH}.a"
    assert torch.equal(factors(model)[name], load_file(folder / WEIGHTS)[A].bfloat16())


def test_what_the_format_cannot_say_is_not_written(tmp_path):
    mixed = tiny_model("llama")
    add(mixed, ["q_proj"], Config())
    add(mixed, ["v_proj"], Config(scaling="root"))
    stack = nn.Sequential(LowRankStack(torch.zeros(1, 2, 2), Config(rank=1)))
    for model in (tiny_model("llama"), mixed, stack):
        with pytest.raises(UnsupportedError, match="adapter_files.write"):
            write(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [
    {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"fan_in_fan_out": True},
    {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"layer_replication": [[0, 2]]}, {"peft_type": "IA3"},
    {"a_key_of_tomorrow": 1}, {"use_dora": 0}, {"auto_map": {"a": "b"}}], ids=str)
def test_what_changes_the_computation_is_refused(folder, changes):
    edit(folder, **changes)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match=f"plain LoRA on linear layers, got {next(iter(changes))}"):
        load(model, folder)
    assert not adapters_of(model) and all(part.requires_grad for part in model.parameters())


@pytest.mark.parametrize("changes", [
    {"a_key_of_tomorrow": None}, {"another": False}, {"init_lora_weights": "gaussian"}, {"task_type": "CAUSAL_LM"},
    {"layers_to_transform": [0]}, {"target_modules": "q_proj|v_proj"}, {"lora_dropout": 0}], ids=str)
def test_what_does_not_is_passed_over(folder, changes):
    edit(folder, **changes)
    assert len(load(tiny_model("llama"), folder)) == 6


@pytest.mark.parametrize("changes, expected", [
    ({"r": 0}, "rank a whole number"), ({"r": "4"}, "rank a whole number"), ({"r": True}, "rank a whole number"),
    ({"lora_alpha": 1e999}, "alpha a finite|Infinity, which is no JSON"), ({"lora_dropout": 1.5}, "dropout from 0"),
    ({"use_rslora": 1}, "use_rslora true or false"), ({"rank_pattern": {"(a+)+b": 2}}, "patterns from module names"),
    ({"rank_pattern": [1]}, "patterns from module names"), ({"alpha_pattern": {"v_proj": "x"}}, "alpha a finite"),
    ({"rank_pattern": {"v_proj": -1}}, "rank a whole number"), ({"target_modules": [1]}, "target_modules a list"),
    ({"target_modules": {}}, "target_modules a list")], ids=str)
def test_a_malformed_config_is_refused(folder, changes, expected):
    edit(folder, **changes)
    with pytest.raises(FileError, match=f"{expected}"):
        load(tiny_model("llama"), folder)


def test_a_config_of_no_type_is_refused(folder):
    value = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({key: item for key, item in value.items() if key != "peft_type"}))
    with pytest.raises(FileError, match="peft_type LORA"):
        read_settings(folder)


@pytest.mark.parametrize("change, error, expected", [
    (lambda t: t.update({A: t[A][:3].clone()}), FileError, "factors"),
    (lambda t: t.update({B: t[B].T.contiguous()}), FileError, "factors"),
    (lambda t: t.pop(B), FileError, "factors"),
    (lambda t: t.update({name.replace("layers.0", "layers.9"): t.pop(name) for name in (A, B)}),
     FileError, "a plain nn.Linear"),
    (lambda t: t.update({name.replace("self_attn.q_proj", "input_layernorm"): t.pop(name) for name in (A, B)}),
     FileError, "a plain nn.Linear"),
    (lambda t: t.update({name.replace("q_proj", "k_proj"): t.pop(name) for name in (A, B)}),
     FileError, "among the target_modules"),
    (lambda t: t.update({A: t[A].int()}), UnsupportedError, "dtype I32"),
    (lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): t.pop(A)}), UnsupportedError, "magnitude"),
    (lambda t: t.update({"lm_head.weight": t.pop(A)}), UnsupportedError, "lm_head"),
    (lambda t: t.update({A.replace(".weight", ".default.weight"): t[A].clone()}), FileError, "twice"),
], ids=["rank", "transposed", "half", "no layer", "a norm", "not targeted", "integers", "dora", "another", "twice"])
def test_tensors_that_do_not_fit_are_refused(folder, change, error, expected):
    retensor(folder, change)
    model = tiny_model("llama")
    with pytest.raises(error, match=expected):
        load(model, folder)
    assert not adapters_of(model) and all(part.requires_grad for part in model.parameters())


def test_an_adapters_name_in_the_tensors_is_passed_over(folder):
    retensor(folder, lambda t: t.update({A.replace(".weight", ".default.weight"): t.pop(A)}))
    assert len(load(tiny_model("llama"), folder)) == 6


def test_weights_that_can_hold_code_are_never_opened(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileError, match="other formats can hold code"):
        load(tiny_model("llama"), folder)


def test_a_header_that_lies_about_its_sizes_is_refused(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(raw[:-4])
    with pytest.raises(FileError, match="a whole safetensors file"):
        load(tiny_model("llama"), folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / WEIGHTS
    (folder / WEIGHTS).rename(elsewhere)
    (folder / WEIGHTS).symlink_to(elsewhere)
    with pytest.raises(FileError, match="a link that leads elsewhere"):
        load(tiny_model("llama"), folder)


def test_a_model_with_adapters_is_refused(folder):
    with pytest.raises(UnsupportedError, match="a model without adapters"):
        load(adapted(), folder)
