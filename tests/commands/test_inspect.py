"""`sentei inspect`: what it tells of every kind of checkpoint, without loading anything, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attacks.on_runs import trace
from attacks.on_settings import adapter, pruned
from attacks.on_training import saved, trained
from attacks.on_weights import INDEX, gguf, model, sharded
from terminal import last_error

from sentei import cli
from sentei.conversion import export, inspection
from sentei.core.errors import FileError, UnsupportedError
from sentei.training import checkpoints, job

ROOT = Path(cli.__file__).parents[1]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "gguf", "tokenizers", "yaml"}
PARAMETERS = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64) + 320 * 64 + 64
KINDS = {"model": (model, PARAMETERS), "model of shards": (sharded, PARAMETERS), "GGUF file": (gguf, None),
         "pruned model": (pruned, PARAMETERS), "adapter": (adapter, 3 * 4 * (64 + 64 + 64 + 32)),
         "training run": (saved, 13), "trace": (trace, None)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told(tmp_path, kind):
    make, parameters = KINDS[kind]
    facts, refused = inspection.inspect(make(tmp_path / "a"))
    assert refused is None and facts["kind"] == kind.removesuffix(" of shards")
    assert parameters in (None, facts["parameters"])
    assert sum(one["tensors"] for one in facts["dtypes"].values()) == len(facts["tensors"]) > 0
    assert sum(one["bytes"] for one in facts["dtypes"].values()) == facts["bytes"] > 0
    assert facts["checked"] and facts["files"]
    json.dumps(facts, allow_nan=False)


def test_a_trained_model_is_a_training_run(tmp_path):
    path = trained(tmp_path)
    (path / inspection.RUN).write_text("{}")
    facts, refused = inspection.inspect(path)
    assert refused is None and (facts["kind"], facts["settings"]["width"]) == ("training run", "16")


def test_what_it_knows_of_other_floors_is_what_they_say():
    assert (inspection.POLICY, inspection.POLICY_SCHEMA, inspection.MAX_POLICY_BYTES) == (
        export.POLICY, export.SCHEMA, export.MAX_POLICY_BYTES)
    assert (inspection.CHECKPOINT_SCHEMA, inspection.TRAIN_SCHEMA, inspection.RUN) == (
        checkpoints.SCHEMA, job.SCHEMA, job.MARKER)


def changed(path: Path, name: str, **changes) -> Path:
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | changes))
    return path


def test_facts_are_told_also_of_what_is_refused(tmp_path):
    facts, refused = inspection.inspect(changed(model(tmp_path), "config.json", auto_map={"AutoModel": "a.B"}))
    assert isinstance(refused, FileError) and "auto_map" in refused.got
    assert facts["parameters"] == PARAMETERS and "auto_map" in facts["settings"] and "checked" not in facts


def test_the_first_reason_is_told(tmp_path):
    path = changed(model(tmp_path), "config.json", model_type="mamba", architectures=["Mamba"])
    (path / "tokenizer.json").unlink()
    assert isinstance(inspection.inspect(path)[1], UnsupportedError)


@pytest.mark.parametrize("layers", [2, 4, 1000])
def test_layers_that_are_not_there_are_missed(tmp_path, layers):
    refused = inspection.inspect(changed(model(tmp_path), "config.json", num_hidden_layers=layers))[1]
    assert refused.got == "those of 3" and f"{layers:,} layers" in refused.expected


def test_files_that_are_never_opened_are_named(tmp_path):
    path = model(tmp_path)
    for name in ("pytorch_model.bin", "modeling_llama.py", "chat_template.jinja"):
        (path / name).write_text("x")
    assert inspection.inspect(path)[0]["ignored"] == {
        "chat_template.jinja": "never rendered", "modeling_llama.py": "never run", "pytorch_model.bin": "never opened"}


@pytest.mark.parametrize("make", [lambda path: path / "none", lambda path: path, lambda path: path / "a.bin",
                                  lambda path: path / ("a" * 300)],
                         ids=["nothing", "a folder of nothing", "a pickle", "a name too long"])
def test_what_says_nothing_of_itself_is_refused(tmp_path, make):
    (tmp_path / "a.bin").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(FileError):
        inspection.inspect(make(tmp_path))


def test_a_broken_checkpoint_beside_a_whole_one_is_told(tmp_path):
    path = saved(tmp_path)
    (path / "checkpoint-00000002.safetensors").write_bytes(b"")
    facts, refused = inspection.inspect(path)
    assert len(facts["checkpoints"]) == 2 and "as many bytes" in refused.expected


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["plain", "json"])
def test_hostile_text_is_escaped(sentei, tmp_path, flags):
    path = changed(model(tmp_path), "config.json", _name_or_path="\x1b]0;evil\x07\u202eetc")
    done = sentei("inspect", path, *flags)
    assert done.returncode == 0 and "evil" in done.stdout
    assert done.stdout.replace("×", "").isascii() and not {"\x1b", "\x07"} & set(done.stdout)


def test_a_refusal_is_told_on_both_streams_with_its_exit_code(sentei, tmp_path):
    path = sharded(tmp_path)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../\x1b[31m.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    done = sentei("inspect", path, "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["accepted"], result["kind"]) == (3, False, "model")
    parts = last_error(done.stderr)
    assert "\x1b" not in done.stderr
    assert result["refused"]["expected"] == parts["expected"] == "file names without folders"


def run(*arguments) -> subprocess.CompletedProcess:
    """`sentei inspect ARGUMENTS` in a process of its own, which then tells how long it worked and what it loaded."""
    code = ("import sys, time; from sentei import cli; start = time.process_time(); code = cli.main(); "
            "print(time.process_time() - start, *{name.split('.')[0] for name in sys.modules}, file=sys.stderr); "
            "sys.exit(code)")
    return subprocess.run([sys.executable, "-c", code, "inspect", *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


@pytest.mark.parametrize("kind", ["model of shards", "GGUF file", "pruned model", "adapter", "training run", "trace"])
def test_nothing_heavy_is_loaded_and_it_is_quick(tmp_path, kind):
    done = run(KINDS[kind][0](tmp_path / "a"))
    seconds, *loaded = done.stderr.split()
    assert done.returncode == 0, done.stderr
    assert "sentei" in loaded and not HEAVY & set(loaded)
    assert float(seconds) < 0.3


def test_the_embedded_model_is_looked_at_quickly(tmp_path, monkeypatch):
    model(tmp_path).rename(tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("./default", "--json").stdout)["parameters"] == PARAMETERS
    done = run("default", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["parameters"] == 134_515_008
    assert float(done.stderr.split()[0]) < 0.3
