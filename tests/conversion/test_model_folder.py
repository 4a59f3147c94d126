"""What may lie in a model's folder, and where its links may lead."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sentei.conversion.model_folder import (
    INDEX,
    PICKLES,
    WEIGHTS,
    check_side_files,
    member,
    read_config,
    refuse_pickle,
    weight_files,
)
from sentei.core.errors import FileError, UnsupportedError


@pytest.fixture
def shards(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-00002-of-00002.safetensors")
    return {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def indexed(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_read_through_the_index(tmp_path, shards):
    files = weight_files(indexed(tmp_path, shards))
    assert {file: list(tensors) for file, tensors in files.items()} == {file: [name] for name, file in shards.items()}


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
                                  "x\0.safetensors", "none.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_of_its_own_folder(tmp_path, shards, name):
    with pytest.raises(FileError):
        weight_files(indexed(tmp_path, shards | {"c": name}))


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"], ids=repr)
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    with pytest.raises(FileError):
        weight_files(indexed(tmp_path, weight_map))


def test_an_index_that_places_a_tensor_wrongly_is_refused(tmp_path, shards):
    with pytest.raises(FileError, match="no 'a'"):
        weight_files(indexed(tmp_path, shards | {"a": shards["b"]}))


def test_a_tensor_in_two_shards_is_refused(tmp_path, shards):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / shards["b"])
    with pytest.raises(FileError, match="two files"):
        weight_files(indexed(tmp_path, shards))


def test_weights_of_another_kind_are_unsupported(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedError):
        weight_files(tmp_path)


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused_by_name(tmp_path, suffix):
    with pytest.raises(FileError, match="never opens"):
        refuse_pickle(tmp_path / f"pytorch_model{suffix.upper()}")
    (tmp_path / f"pytorch_model{suffix}").write_bytes(b"cos\nsystem\n")
    with pytest.raises(FileError, match="never opens.*save_pretrained"):
        weight_files(tmp_path)


def test_a_link_may_stay_inside(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "config.json").symlink_to("real.json")
    assert member(tmp_path, "config.json") == tmp_path / "config.json"


def test_a_link_may_lead_to_the_blobs_of_its_cache(tmp_path):
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (folder / "config.json").symlink_to("../../blobs/123")
    assert member(folder, "config.json").read_text() == "{}"


@pytest.mark.parametrize("make", [
    pytest.param(lambda path: path.symlink_to("/etc/passwd"), id="a-link-outside"),
    pytest.param(lambda path: path.symlink_to(path), id="a-link-to-itself"),
    pytest.param(lambda path: path.symlink_to("nothing"), id="a-link-to-nothing"),
    pytest.param(os.mkfifo, id="a-pipe"),
    pytest.param(lambda path: path.symlink_to("/dev/zero"), id="a-device"),
    pytest.param(lambda path: path.mkdir(), id="a-folder"),
])
@pytest.mark.parametrize("required", [True, False])
def test_what_is_not_a_file_of_the_folder_is_refused(tmp_path, make, required):
    make(tmp_path / "config.json")
    with pytest.raises(FileError):
        member(tmp_path, "config.json", required=required)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json",
                                  "added_tokens.json", "generation_config.json", "tokenizer.model"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")], ids=["pipe", "link"])
def test_every_file_the_tokenizer_opens_is_a_file_of_the_folder(tmp_path, name, make):
    (tmp_path / "tokenizer.json").write_text("{}")
    check_side_files(tmp_path)
    make(tmp_path / name)
    with pytest.raises(FileError, match=name):
        check_side_files(tmp_path)


def test_templates_are_one_small_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    check_side_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (2 << 20))
    with pytest.raises(FileError, match="at most 1,048,576 bytes"):
        check_side_files(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates").symlink_to("/etc")
    with pytest.raises(FileError, match="a folder of them"):
        check_side_files(tmp_path)


def test_a_large_vocabulary_is_read_and_a_bomb_is_not(tmp_path):
    path = tmp_path / "tokenizer.json"
    words = [f"token {number}," for number in range(262_144)]
    path.write_text(json.dumps({"model": {"vocab": {word: index for index, word in enumerate(words)},
                                          "merges": [[word, word] for word in words] * 2}}))
    check_side_files(tmp_path)
    path.write_text('{"a":[' + "[]," * 2_000_000 + "0]}")
    with pytest.raises(FileError, match="values"):
        check_side_files(tmp_path)


def test_an_absent_file_is_none_only_when_it_may_be(tmp_path):
    assert member(tmp_path, "config.json", required=False) is None
    with pytest.raises(FileError):
        member(tmp_path, "config.json")


def test_an_adapter_is_told_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="merge"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 100_000, "\xff", "x" * (2 << 20)],
                         ids=["empty", "half", "list", "key-twice", "deep", "not-utf8", "huge"])
def test_a_malformed_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FileError):
        read_config(tmp_path)


@pytest.mark.parametrize(("name", "key"), [
    ("tokenizer_config.json", "auto_map"), ("tokenizer_config.json", "fast_tokenizer_files"),
    ("generation_config.json", "custom_generate"), ("generation_config.json", "trust_remote_code")])
def test_side_files_may_not_name_code(tmp_path, name, key):
    (tmp_path / "tokenizer.json").write_text("{}")
    check_side_files(tmp_path)
    (tmp_path / name).write_text(json.dumps({key: ["x"]}))
    with pytest.raises(FileError, match=key):
        check_side_files(tmp_path)
