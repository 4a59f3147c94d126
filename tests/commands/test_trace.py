"""`sentei trace` as a user meets it: pages and traces of dense, pruned and trained models, and its errors."""

import json
from dataclasses import replace

import pytest
from terminal import contents, last_error, unfinished
from tiny import save_tiny, save_tiny_encoder, save_tiny_gguf, tiny_model, tiny_tokenizer

from sentei.axes import connections
from sentei.circuit.file import load, save
from sentei.circuit.page import result
from sentei.conversion import embedded
from sentei.conversion.export import export
from sentei.conversion.plan import Plan, convert
from sentei.core.rules import TopK
from sentei.model import Config, Transformer
from sentei.training.job import write_model


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "tiny", "llama")


def test_two_prompts_of_a_dense_model(sentei, folder, tmp_path):
    page, kept = tmp_path / "a.html", tmp_path / "a.trace"
    done = sentei("trace", folder, "the bat", "the bed", "--out", page, "--save", kept, "--json", "--mass", "0.8")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["schema"] == "sentei.traced/1" and result["kind"] == "observed"
    assert result["tokens"] == [7, 7] and result["together"]["shared"] == 5 and result["together"]["differences"] == 0
    assert "80%" in result["rule"] and 0 < result["multiply_adds"][0] < 1
    assert [token.text for token in load(kept).runs[1].tokens] == list("the bed") and not unfinished(tmp_path)
    again = sentei("trace", kept, "--out", tmp_path / "b.html")
    assert again.returncode == 0 and page.read_bytes() == (tmp_path / "b.html").read_bytes()
    lines = dict(line.split(maxsplit=1) for line in again.stdout.splitlines())
    assert lines["shared"] == "5 tokens, identical" and lines["tokens"] == "7 and 7"


def test_a_control(sentei, folder, tmp_path):
    files = "--out", tmp_path / "a.html", "--save", tmp_path / "a.trace"
    done = sentei("trace", folder, "a bat", "a cat", "--control", "a rat", *files)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and lines["tokens"] == "5 and 5 and 5" and lines["control"].startswith("connections")
    assert ["".join(token.text for token in run.tokens) for run in load(tmp_path / "a.trace").runs] == [
        "a bat", "a cat", "a rat"]
    both = result(load(tmp_path / "a.trace"))["together"]
    for name in ("agreement", "control"):
        told = ", ".join(f"{room} {share:.1%}" for room, share in both[name].items() if share is not None)
        assert lines[name] == f"{told} (mean of matched tokens)"
    assert lines["agreement"] != lines["control"]
    again = sentei("trace", tmp_path / "a.trace", "--out", tmp_path / "b.html")
    assert again.returncode == 0 and (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    done = sentei("trace", tmp_path / "a.trace", "--control", "")
    assert done.returncode == 2 and "a saved trace alone" in done.stderr


def test_the_page_has_a_name_of_its_own(sentei, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentei("trace", folder, "one").returncode == 0
    assert (tmp_path / "circuit.html").is_file()


def test_a_pruned_model_writes(sentei, tmp_path):
    rooms = connections.Config(rule=TopK(2), tile=(4, 4), window=0, decode=TopK(1))
    plan = Plan.everywhere([0, 1], "connections", rooms)
    model = convert(tiny_model("llama"), plan)
    export(model, tiny_tokenizer(), plan, tmp_path / "pruned", tokens=model.dummy_inputs["input_ids"][0], facts={})
    done = sentei("trace", tmp_path / "pruned", "a" * 40, "--write", "3", "--out", tmp_path / "a.html", "--json")
    result = json.loads(done.stdout)
    assert result["kind"] == "ran" and result["tokens"] == [43] and result["multiply_adds"][0] < 1


def test_an_encoder_of_transformers(sentei, tmp_path):
    folder = save_tiny_encoder(tmp_path / "bert", "BertForMaskedLM")
    files = "--out", tmp_path / "a.html", "--save", tmp_path / "a.trace"
    done = sentei("trace", folder, "a bat", "a cat", *files, "--json")
    result, kept = json.loads(done.stdout), load(tmp_path / "a.trace")
    assert "REPORT" not in done.stderr  # the head is left in the file on purpose
    assert result["kind"] == "observed" and result["model"] == "bert" and result["tokens"] == [7, 7]
    assert [token.text for token in kept.runs[1].tokens] == ["<s>", *"a cat", "</s>"]
    assert not kept.runs[0].causal and kept.runs[0].following == ()
    assert result["together"]["shared"] == 3 and result["together"]["differences"] > 0  # it has read what follows
    assert sentei("trace", folder, "a bat", "--write", "1").returncode == 2
    assert sentei("trace", folder, "a" * 65).returncode == 2


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_a_trained_model(causal, sentei, tmp_path):
    model = Transformer(Config(width=32, layers=2, causal=causal))
    write_model(model.state_dict(), model.config, tmp_path)
    (tmp_path / "sentei-train.json").write_text("{}")
    done = sentei("trace", tmp_path, "é!", "--out", tmp_path / "a.html", "--save", tmp_path / "a.trace", "--json")
    assert json.loads(done.stdout)["kind"] == "ran"
    run = load(tmp_path / "a.trace").runs[0]
    assert [token.text for token in run.tokens] == ["<c3>", "<a9>", "!"] and run.causal is causal


@pytest.mark.parametrize(("arguments", "code", "where", "got"), [
    ((), 2, "sentei trace", "0 prompts"),
    (("a", "b", "c"), 2, "sentei trace", "3 prompts"),
    (("a", "--control", "b"), 2, "--control", "one prompt"),
    (("",), 2, "trace", "an empty one"),
    (("a", "--mass", "0"), 2, "--mass", "'0'"),
    (("a", "--mass", "nan"), 2, "--mass", "'nan'"),
    (("a", "--write", "1.5"), 2, "--write", "'1.5'"),
    (("a", "--write", "-1"), 2, "--write", "'-1'"),
    (("a" * 1025,), 2, "sentei trace", "1,025"),
    (("a", "b", "--control", "a" * 1025), 2, "sentei trace", "1,025"),
    (("a" * 1000, "--write", "25"), 2, "sentei trace", "1,025"),
    (("a", "--out", "/dev/null/a.html"), 4, "/dev/null/a.html", None),
    (("a", "--save", "/dev/null/a.trace"), 4, "/dev/null/a.trace", None),
], ids=str)
def test_errors_have_four_parts(arguments, code, where, got, sentei, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sentei("trace", folder, *arguments)
    parts = last_error(done.stderr)
    assert (done.returncode, done.stdout, parts["error"]) == (code, "", where)
    assert got is None or parts["got"] == got


@pytest.mark.parametrize(("arguments", "where"), [
    (("MODEL", "a", "--out", "z", "--save", "z"), "--out"),
    (("MODEL", "a", "--out", "z", "--save", "below/../z"), "--out"),
    (("MODEL", "a", "--out", "link", "--save", "b.trace"), "--out"),
    (("MODEL", "a", "--save", "circuit.html"), "--out"),
    (("MODEL", "a", "--out", ""), "--out"),
    (("MODEL", "a", "--save", ""), "--save"),
    (("b.trace", "--out", "b.trace"), "--out"),
    (("b.trace", "--out", "below/../b.trace"), "--out"),
    (("b.trace", "--out", "link"), "--out"),
    (("b.trace", "--out", ""), "--out"),
    (("circuit.html",), "--out"),
    (("b.trace", "a", "--save", "b.trace"), "--save"),
], ids=str)
def test_no_file_is_written_over_another(arguments, where, sentei, tmp_path, monkeypatch):
    """Nothing is read before: neither the model nor the trace is one, and nothing changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    for name in ("b.trace", "circuit.html") if "MODEL" not in arguments else ("b.trace",):
        (tmp_path / name).write_bytes(b"what is there")
    (tmp_path / "link").symlink_to("b.trace")
    before = contents(tmp_path)
    done = sentei("trace", *arguments)
    assert (done.returncode, done.stdout, last_error(done.stderr)["error"]) == (2, "", where)
    assert contents(tmp_path) == before


def test_names_that_a_terminal_would_obey_are_told_by_their_numbers(sentei, tmp_path, monkeypatch):
    """Of the folder of a model, and in a trace that a stranger has written."""
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "a\x1b[2J\u202eb", "llama")
    done = sentei("trace", folder, "a", "--save", "b.trace", "--out", "b.html")
    assert done.returncode == 0 and r"a\u001b[2J\u202eb, observed" in done.stdout
    assert not {"\x1b", "\u202e"} & {*done.stdout, *done.stderr}
    circuit = load(tmp_path / "b.trace")
    save(replace(circuit, rule="\x1b]0;owned\x07\u202e", model="m" * 1000), tmp_path / "c.trace")
    again = sentei("trace", "c.trace", "--out", "c.html")
    assert again.returncode == 0 and "m" * 139 + r"…, observed: \u001b]0;owned\u0007\u202e" in again.stdout
    save(replace(circuit, model="m" * 60_000), tmp_path / "d.trace")
    assert sentei("trace", "d.trace", "--out", "d.html").returncode == 3 and not (tmp_path / "d.html").exists()


def test_files_apart_are_written(sentei, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentei("trace", folder, "a", "--save", "b.trace", "--out", "b.html").returncode == 0
    assert sentei("trace", folder, "a", "--save", "b.trace", "--out", "b.html").returncode == 0
    assert sentei("trace", "b.trace", "--out", "b.html").returncode == 0


def test_models_and_traces_that_are_not_there(sentei, folder, tmp_path):
    assert sentei("trace", tmp_path / "nothing", "a").returncode == 3
    assert sentei("trace", tmp_path / "nothing.trace").returncode == 2
    sentei("trace", folder, "a", "--out", tmp_path / "a.html", "--save", tmp_path / "a.trace")
    done = sentei("trace", tmp_path / "a.trace", "a")
    assert done.returncode == 2 and "a saved trace alone" in done.stderr
    (tmp_path / "a.trace").write_bytes((tmp_path / "a.trace").read_bytes()[:-3])
    assert sentei("trace", tmp_path / "a.trace").returncode == 3


@pytest.mark.parametrize("kind", ["a pruned model", "a trained model", "an encoder", "a trace"])
def test_the_name_of_the_default_is_decided_before_the_disk(kind, sentei, folder, tmp_path, monkeypatch):
    class Package:
        version = "9"

        def locate_file(self, name):
            return tmp_path / "Embedded-Q4_1.gguf"

    monkeypatch.setattr(embedded, "distribution", lambda name: Package())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_tiny_gguf(tmp_path / "Embedded-Q4_1.gguf", "llama")
    if kind == "a pruned model":
        plan = Plan.everywhere([0, 1], "connections", connections.Config(rule=TopK(2), tile=(4, 4), window=0))
        model = convert(tiny_model("llama"), plan)
        export(model, tiny_tokenizer(), plan, tmp_path / "default", tokens=model.dummy_inputs["input_ids"][0], facts={})
    elif kind == "a trained model":
        (tmp_path / "default").mkdir()
        model = Transformer(Config(width=32, layers=2))
        write_model(model.state_dict(), model.config, tmp_path / "default")
        (tmp_path / "default" / "sentei-train.json").write_text("{}")
    elif kind == "an encoder":
        save_tiny_encoder(tmp_path / "default", "BertForMaskedLM")
    else:
        assert sentei("trace", folder, "a bat", "--out", "a.html", "--save", "default").returncode == 0
    done = sentei("trace", "default", "a bat", "--out", "b.html", "--json")
    result = json.loads(done.stdout)
    assert (result["model"], result["kind"], result["tokens"]) == ("Embedded-Q4_1", "observed", [5])
    own = sentei("trace", "./default", *([] if kind == "a trace" else ["a bat"]), "--out", "c.html", "--json")
    assert json.loads(own.stdout)["model"] == ("tiny" if kind == "a trace" else "default")
