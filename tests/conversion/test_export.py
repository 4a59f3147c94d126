"""A pruned model on disk: loaded as it was written, checked in a process of its own, and never trusted."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer

from sentei.axes.connections import Config
from sentei.conversion import export, native, wrapper
from sentei.conversion.export import POLICY, RECEIPT, check, check_afresh, load
from sentei.conversion.plan import Entry, Plan, convert
from sentei.core.errors import FileError
from sentei.core.rules import Threshold

TOKENS = torch.arange(3, 83)
PLAN = Plan((Entry(layer=1, room="connections", config=Config(rule=Threshold(0.1), tile=(8, 4), window=2)),))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pruned"
    export.export(convert(tiny_model("llama"), PLAN), tiny_tokenizer(), PLAN, path, tokens=TOKENS, facts={})
    return path


def edit(folder, **changes):
    """Changes the configuration of the policy's only entry."""
    policy = json.loads((folder / POLICY).read_text())
    policy["plan"][0]["config"] |= changes
    (folder / POLICY).write_text(json.dumps(policy))


def test_a_folder_loads_as_it_was_written(folder):
    model, expected = load(folder), convert(tiny_model("llama"), PLAN)
    assert list(wrapper.rooms(model)) == ["model.layers.1.self_attn"]
    assert torch.equal(model(TOKENS[None]).logits, expected(TOKENS[None]).logits)
    assert check(folder)["met"]


@pytest.mark.parametrize("many", [True, False])
def test_a_receipt_does_not_depend_on_which_layers_are_faster_natively(tmp_path, monkeypatch, many):
    """All of them where it is written, and none where it is read; or the other way round."""
    install = native.install
    rows = dict(most_rows=0, many_rows=0), dict(most_rows=8, many_rows=1)
    monkeypatch.setattr(native, "install", lambda model: install(model, **rows[many]))
    model = convert(tiny_model("llama"), PLAN)
    assert native.is_installed(model) == many
    export.export(model, tiny_tokenizer(), PLAN, tmp_path / "pruned", tokens=TOKENS, facts={})
    assert native.is_installed(model) == many
    monkeypatch.setattr(native, "install", lambda model: install(model, **rows[not many]))
    assert check(tmp_path / "pruned")["difference"] == 0


def test_a_folder_called_default_is_itself(folder, monkeypatch):
    """It is named as a folder, and nobody means the embedded model by it."""
    folder.rename(folder.parent / "default")
    monkeypatch.chdir(folder.parent)
    assert torch.equal(load("default")(TOKENS[None]).logits, load("./default")(TOKENS[None]).logits)
    assert check(Path("default"))["met"]


def test_a_fresh_process_runs_nothing_that_lies_in_the_working_folder(folder, tmp_path, monkeypatch):
    """`cd downloaded-model && sentei verify .`"""
    (folder / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom nowhere import dumps\n")
    monkeypatch.chdir(folder)
    assert check_afresh(folder)["met"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [
    {"rule": {"name": "threshold", "ratio": [0.1, 0.2]}}, {"rule": {"name": "fixed", "ids": [10**6]}},
    {"tile": [10**30, 64]}, {"rule": {"name": "topk", "k": [1, 2, 3]}},
], ids=["ratios of other heads", "ids out of range", "huge tiles", "counts of other heads"])
def test_a_policy_that_does_not_fit_the_model_is_a_bad_file(folder, changes):
    edit(folder, **changes)
    with pytest.raises(FileError):
        load(folder)


@pytest.mark.parametrize("name", [POLICY, RECEIPT])
@pytest.mark.parametrize("make", [
    pytest.param(os.mkfifo, id="a-pipe"),
    pytest.param(lambda path: path.symlink_to("/etc/passwd"), id="a-link-outside"),
    pytest.param(lambda path: path.mkdir(), id="a-folder"), pytest.param(lambda path: None, id="nothing"),
])
def test_policy_and_receipt_are_files_of_the_folder(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(FileError, match=name):
        check(folder)


def test_a_receipt_too_large_is_not_read(folder):
    with open(folder / RECEIPT, "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(FileError, match="at most"):
        check(folder)


def test_no_path_of_the_writer_goes_into_the_folder(tmp_path):
    from sentei.conversion.checkpoints import load_model, load_tokenizer, locate

    checkpoint = locate(str(save_tiny(tmp_path / "private" / "model", "llama")))
    model, tokenizer = convert(load_model(checkpoint), PLAN), load_tokenizer(checkpoint)
    export.export(model, tokenizer, PLAN, tmp_path / "out", tokens=TOKENS, facts={"source": checkpoint.source})
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
