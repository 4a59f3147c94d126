"""Bad input and full disks, through the command line: the exit code, an error in four parts, nothing half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from terminal import contents, last_error, unfinished, watching
from tiny import save_tiny_gguf

from sentei.commands import prune as main_job

RESULT = {"config.json", "model.safetensors", "sentei.json", "sentei-receipt.json", "report.html"}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def configured(model: Path, **changes) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(model: Path) -> Path:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return model / "pytorch_model.bin"


# name: (what is done to a copy of the model and the changed arguments, exit code, where, expected, got)
BAD = {
    "a model that is missing": (
        lambda model: {"model": model / "none"}, 3, "none", "a model folder or a .gguf file", "nothing at this path"),
    "a model of nobody": (
        lambda model: {"model": "~nobody-here/m"}, 3, "~nobody-here/m", "a model folder or a .gguf file", "nothing"),
    "a model named too long": (
        lambda model: {"model": "m" * 300}, 3, "mmm", "a model folder or a .gguf file", "nothing at this path"),
    "a folder without a model": (
        lambda model: (model / "config.json").unlink(), 3, "model", "a model folder with config.json", "without it"),
    "a text that is missing": (
        lambda model: {"text": model / "none"}, 3, "none", "a text file that can be read", "No such file"),
    "a text that is a folder": (lambda model: {"text": model}, 3, "model", "a plain text file", "a folder"),
    "an empty text": (lambda model: {"text": written(model / "t", b" \n")}, 3, "t", "a text", "an empty file"),
    "a text too short": (
        lambda model: {"text": written(model / "t", b"too short")}, 3, "--text", "at least 1,280 tokens", "9 tokens"),
    "a text that is not UTF-8": (
        lambda model: {"text": written(model / "t", b"caf\xe9 ol\xe9")}, 3, "t", "text in UTF-8",
        "byte 0xe9 at position 3"),
    "a truncated safetensors file": (
        lambda model: os.truncate(model / "model.safetensors", 400_000), 3, "model.safetensors",
        "a whole safetensors file", "bytes of tensors where the header describes"),
    "a safetensors file cut in its header": (
        lambda model: os.truncate(model / "model.safetensors", 100), 3, "model.safetensors",
        "a whole safetensors file", "a header of"),
    "a .bin pickle": (
        lambda model: {"model": pickled(model)}, 3, "pytorch_model.bin", "safetensors or GGUF", "never opens"),
    "a folder with a .bin pickle alone": (
        lambda model: pickled(model) and None, 3, "model", "model.safetensors", "pytorch_model.bin"),
    "a private key in config.json": (
        lambda model: configured(model, _attn_implementation="x"), 3, "config.json", "settings of a llama model",
        "the private key '_attn_implementation'"),
    "an unknown key in config.json": (
        lambda model: configured(model, sliding_doors=3), 3, "config.json", "settings of a llama model",
        "the unknown key 'sliding_doors'"),
    "a config that names code": (
        lambda model: configured(model, auto_map={"AutoModel": "m.M"}), 3, "config.json", "settings only", "auto_map"),
    "a config that is cut off": (
        lambda model: os.truncate(model / "config.json", 99), 3, "config.json", "one well-formed JSON object", ""),
    "a model without its tokenizer": (
        lambda model: (model / "tokenizer.json").unlink(), 3, "tokenizer.json", "a file that can be read", "No such"),
    "an unsupported architecture": (
        lambda model: configured(model, model_type="mamba", architectures=["MambaForCausalLM"]), 5, "config.json",
        "llama", "mamba"),
    "a quality above 1": (
        lambda model: {"quality": 1.01}, 2, "--quality", "a number above 0 and at most 1", "'1.01'"),
    "a workload that is none": (
        lambda model: {"workload": "prefill:1"}, 2, "--workload", "at least 2 tokens", "'prefill:1'"),
    "a workload beyond the model's context": (
        lambda model: {"workload": "prefill:1025"}, 2, "--workload", "context of 1,024 tokens", "1,025"),
    "a folder that is not ours as --out": (
        lambda model: {"out": model}, 2, "--out", "one that sentei prune made", "holds something else"),
    "a file as --out": (
        lambda model: {"out": model / "config.json"}, 2, "--out", "a new or empty folder", "holds something else"),
    "an --out below a file": (
        lambda model: {"out": model / "config.json" / "out"}, 4, "out", "a path that can be written",
        "Not a directory"),
    "an --out named too long": (
        lambda model: {"out": model.parent / ("o" * 300)}, 4, "o" * 300, "a path that can be written", "too long"),
}


@pytest.fixture
def model(subject, tmp_path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return shutil.copytree(subject["model"], tmp_path / "model")


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["plain", "json"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_four_parts_and_nothing_is_written(prune, model, tmp_path, name, flags):
    spoil, code, where, expected, got = BAD[name]
    changes = spoil(model) or {}
    before = contents(tmp_path)
    done = prune(*flags, **{"model": model, **(changes if isinstance(changes, dict) else {})})
    parts = last_error(done.stderr)
    assert (done.returncode, done.stdout) == (code, "")
    assert where in parts["error"] and expected in parts["expected"] and got in parts["got"] and parts["do this"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [None, "{}", '{"schema": "sentei.policy/1", "dtype": "int4", "plan": {}}'], ids=str)
def test_verify_refuses_a_folder_without_a_policy(sentei, tmp_path, content):
    if content:
        (tmp_path / "sentei.json").write_text(content)
    done = sentei("verify", tmp_path, "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert last_error(done.stderr)["error"].endswith("sentei.json" if content else tmp_path.name)


def test_a_result_that_fails_its_own_receipt_is_no_result(prune, tmp_path, monkeypatch):
    monkeypatch.setattr("sentei.conversion.export.check_afresh",
                        lambda _: {"met": False, "difference": 1.0, "tolerance": 0.1})
    done = prune("--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert last_error(done.stderr)["got"] == "a difference of 1.0"
    assert not {"sentei-receipt.json", "report.html"} & set(os.listdir(tmp_path / "out"))


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_full(done, out: Path) -> None:
    """Raises AssertionError unless the run ended as it must on a full disk."""
    parts = last_error(done.stderr)
    assert (done.returncode, done.stdout, parts["got"]) == (4, "", "a full disk")
    assert parts["do this"] == "free some space and run the same command again"
    assert unfinished(out) == []
    assert all(json.loads(path.read_text()) for path in out.rglob("*.json"))


# The folder is claimed after "load" and before "calibrate".
@pytest.mark.parametrize("stage", ["load", "calibrate", "slack", "solve", "measure", "export", "report"])
def test_a_disk_that_is_full_in_a_stage_leaves_no_half_file_and_the_same_command_goes_on(
        prune, tmp_path, monkeypatch, stage):
    with monkeypatch.context() as fault:
        fault.setattr(main_job, "Progress", watching(
            lambda name, _: name == stage and fault.setattr(os, "fsync", disk_full)))
        check_full(prune("--json"), tmp_path / "out")
    again = prune()
    assert again.returncode == 0 and RESULT <= set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("target, error", [
    ("safetensors.torch.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("sentei.pipeline.export.os.replace", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
], ids=["safetensors", "a quota, while files are moved"])
def test_a_full_disk_spares_the_export_of_an_earlier_run_or_takes_its_policy(
        prune, tmp_path, monkeypatch, target, error):
    """Whole weights of two runs are never mixed under one policy."""
    prune()
    policy = tmp_path / "out" / "sentei.json"
    before = contents(tmp_path / "out")

    def fail(source, place=None, *_):
        raise error

    with monkeypatch.context() as fault:
        fault.setattr(target, fail)
        done = prune("--json")
    parts = last_error(done.stderr)
    assert (done.returncode, done.stdout, parts["got"]) == (4, "", "a full disk")
    assert unfinished(tmp_path / "out") == []
    assert contents(tmp_path / "out") == before or not policy.exists()
    assert prune().returncode == 0


@pytest.fixture
def gguf(tmp_path, monkeypatch) -> Path:
    """A tiny GGUF file, and a home of its own for the cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("target, fault", [
    ("os.fsync", disk_full),
    ("safetensors.torch.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
], ids=["fsync", "safetensors"])
def test_a_disk_too_full_to_unpack_a_gguf_leaves_an_empty_cache(prune, gguf, tmp_path, monkeypatch, target, fault):
    def fail(*_, **__):
        raise fault

    with monkeypatch.context() as broken:
        broken.setattr(target, fail if isinstance(fault, Exception) else fault)
        check_full(prune(model=gguf), tmp_path / "out")
    cache = tmp_path / "home" / ".cache" / "sentei"
    assert [path.suffix for path in cache.iterdir()] == [".lock"] and not (tmp_path / "out").exists()
    assert prune(model=gguf).returncode == 0


def test_a_cache_that_cannot_be_written_is_not_blamed_on_out(prune, gguf, tmp_path):
    (tmp_path / "home").write_text("a file")
    done = prune(model=gguf)
    parts = last_error(done.stderr)
    assert (done.returncode, done.stdout) == (4, "") and not (tmp_path / "out").exists()
    assert parts["error"].endswith(".cache/sentei") and "--out" not in parts["do this"]
