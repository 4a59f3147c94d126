"""A GGUF file is converted once; whatever is damaged or unfinished is built again; failures leave nothing behind."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
from tiny import save_tiny_gguf

from sentei.conversion import gguf_cache
from sentei.conversion.gguf_cache import DONE, dequantise
from sentei.core.errors import FileError, ResourceError
from sentei.core.storage import sha256


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    save_tiny_gguf(path, "llama")
    return path


def left_in(cache):
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_the_second_use_converts_nothing(model, tmp_path, monkeypatch):
    folder, header, done = dequantise(model, tmp_path / "cache")
    assert (header.quantisation, done["dtype"]) == ("F32", "float32")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", DONE}
    monkeypatch.setattr(gguf_cache, "_build", None)
    assert dequantise(model, tmp_path / "cache") == (folder, header, done)


@pytest.mark.parametrize("damage", [
    pytest.param(lambda folder: (folder / DONE).unlink(), id="no-record"),
    pytest.param(lambda folder: (folder / DONE).write_text("{"), id="half-a-record"),
    pytest.param(lambda folder: (folder / DONE).write_text("{}"), id="an-empty-record"),
    pytest.param(lambda folder: (folder / "config.json").unlink(), id="a-file-missing"),
    pytest.param(lambda folder: (folder / "pytorch_model.bin").write_text("x"), id="a-file-added"),
    pytest.param(lambda folder: os.truncate(folder / "model.safetensors", 1000), id="weights-truncated"),
    pytest.param(lambda folder: flip_a_bit(folder / "model.safetensors"), id="a-bit-flipped"),
])
def test_a_damaged_folder_is_built_again(model, tmp_path, damage):
    folder, _, done = dequantise(model, tmp_path / "cache")
    damage(folder)
    assert dequantise(model, tmp_path / "cache")[2] == done
    assert {path.name for path in folder.iterdir()} == {DONE, *done["files"]}
    assert {name: sha256(folder / name) for name in done["files"]} == {
        name: file["sha256"] for name, file in done["files"].items()}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_a_killed_run_left_is_removed(model, tmp_path):
    folder, _, _ = dequantise(model, tmp_path / "cache")
    shutil.rmtree(folder)
    (tmp_path / "cache" / f".{folder.name}.abc.part").mkdir()
    dequantise(model, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == [folder.name]


@pytest.mark.parametrize(("raised", "expected"), [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
], ids=["ctrl-c", "disk-full-while-writing"])
def test_a_failure_leaves_nothing_behind(model, tmp_path, monkeypatch, raised, expected):
    def fail(*_):
        raise raised

    monkeypatch.setattr(gguf_cache, "write_json", fail)
    with pytest.raises(expected):
        dequantise(model, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_disk_too_small_is_known_before(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(ResourceError, match="free disk"):
        dequantise(model, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_is_a_resource_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        dequantise(model, tmp_path / "file" / "cache")


def test_a_large_model_is_kept_in_bfloat16(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cache, "MAX_FLOAT32_WEIGHTS", 1000)
    assert dequantise(model, tmp_path / "cache")[2]["dtype"] == "bfloat16"


def test_the_package_that_unpacks_is_named_when_missing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cache, "find_spec", lambda _: None)
    with pytest.raises(FileError, match="pip install gguf"):
        dequantise(model, tmp_path / "cache")


def test_settings_are_checked_like_any_config(tmp_path):
    save_tiny_gguf(tmp_path / "model.gguf", "llama", **{"llama.attention.head_count": 10**9})
    with pytest.raises(FileError, match="num_attention_heads"):
        dequantise(tmp_path / "model.gguf", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
