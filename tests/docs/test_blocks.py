"""Every block of Python and every `sentei` line in the documentation runs; `pytest -s` lists how each one does.

The pieces of a page run in order, in one folder and with one set of names, as a reader would run them. What takes
minutes runs small: `documents.SMALL` says what is changed, and the list where. Slow tests run lines as they stand.
"""

import re
import shlex
import time
from dataclasses import replace

import pytest
import torch
from benches.test_benches import SMALL as SMALL_BENCHES
from benches.test_rooms import SMALL as SMALL_ROOMS
from documents import PAGES, ROOT, Piece, pieces, read
from tiny import save_tiny_encoder, tiny_model, tiny_tokenizer

from docs.builder.markdown import parse
from sentei import pipeline
from sentei.benches import attention, cold, layers, linear, lora, rooms
from sentei.benches import table as benches
from sentei.budget import slack
from sentei.conversion import export
from sentei.lab.table import chosen
from sentei.measurement.latency import Comparison
from sentei.measurement.text import read_text
from sentei.training import data

KINDS = ("python", "command")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny Llama in a folder that pages call my-model; it looks at few places, so that there is something to drop."""
    folder, model = tmp_path_factory.mktemp("pages") / "my-model", tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 30
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text():
    """The beginning of the default text."""
    return replace(read_text(None), text=read_text(None).text[:16_000])


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """Where a page's pieces run: a model and an encoder, a text called README.md, and the examples with fewer steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(tiny)
    save_tiny_encoder(tmp_path / "my-encoder", initializer_range=0.2, max_position_embeddings=512)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:300], encoding="utf-8")
    (tmp_path / "examples").mkdir()
    for path in (ROOT / "examples").glob("*.yaml"):
        text = re.sub(r"(steps|evaluate|save): \d+", r"\1: 2", path.read_text(encoding="utf-8"))
        (tmp_path / "examples" / path.name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def small_cases(monkeypatch, text):
    """Every case of every bench of milliseconds, under the name it has; a short default text; and clocks of prune that
    count what is kept."""
    def shrink(module, cases):
        monkeypatch.setattr(module, "CASES", {name: cases for name in module.CASES})

    shrink(attention, [attention.Case(2, 1, 8, 130)])
    monkeypatch.setitem(attention.CASES, "layer", [layers.Layer(2, 1, 8, 200, 1)])
    monkeypatch.setattr(benches, "PARTS", {})  # one of them measures in processes of its own
    for module, cases in [*SMALL_BENCHES.values(), *SMALL_ROOMS.values()]:
        shrink(module, cases[:1])
    monkeypatch.setattr(rooms, "CASES", {name: cases for part in rooms.PARTS for name, cases in part.CASES.items()})
    monkeypatch.setattr(cold, "size", lambda: 1 << 18)
    monkeypatch.setattr(linear, "TURN", 1 << 16)
    monkeypatch.setattr(lora, "SIZES", lora.SIZES | {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1})
    monkeypatch.setattr(export, "check_afresh", export.check)
    monkeypatch.setattr("sentei.measurement.report.write_plots", lambda *_: [])
    monkeypatch.setattr(Comparison, "ratios", lambda _: [2.0])
    for module in (pipeline, data):
        monkeypatch.setattr(module, "read_text", lambda path: text if path is None else read_text(path))
    monkeypatch.setattr("sentei.budget.offers.candidates", lambda *_: [])  # other rooms: by what the clock says here
    average = slack._average
    monkeypatch.setattr(slack, "_average", lambda *given: [
        replace(option, seconds=sum(option.density) / len(option.density)) for option in average(*given)])


def run(piece: Piece, folder, names: dict, command) -> None:
    """Runs a piece, or writes it; raises where it fails."""
    if piece.kind == "python":
        exec(compile(piece.small(), f"line {piece.line}", "exec"), names)
    elif piece.kind == "yaml":
        name = re.match(r"# (\w+\.yaml)\n", piece.text)
        assert name, f"line {piece.line}: the first line of a file says its name"
        (folder / name[1]).write_text(piece.text, encoding="utf-8")
    elif piece.kind == "command":
        done = command(*shlex.split(piece.small(), comments=True)[1:])
        assert done.returncode == 0, f"line {piece.line}, {piece.text}: {done.stderr[-6000:]}"


@pytest.mark.parametrize("path", PAGES)
def test_a_page_runs(path, folder, small_cases, sentei, request):
    names = {"__name__": "page"}
    found, spent = read(path), []
    with torch.random.fork_rng(devices=[]):
        for piece in found:
            start = time.process_time()
            run(piece, folder, names, sentei)
            spent.append(time.process_time() - start)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        if request.config.getoption("capture") == "no":
            print("\n".join(["", *(f"{path}:{piece.line:<5} {piece.kind:<8} {seconds:4.1f} s  {piece.how}"
                                   for piece, seconds in zip(found, spent, strict=True))]))


def test_there_is_code_to_run():
    found = [piece for path in PAGES for piece in read(path)]
    assert {path for path in PAGES if "/rooms/" in path} <= {
        path for path in PAGES if sum(piece.kind == "python" for piece in read(path)) >= 2}
    assert sum(piece.kind == "python" for piece in found) >= 20
    assert sum(piece.kind == "command" for piece in found) >= 20


def test_claims_that_are_named_are_there():
    lines = [piece.text for path in PAGES for piece in read(path) if piece.text.startswith("sentei lab ")]
    assert lines and all(chosen([word for word in shlex.split(line)[2:] if word[0] != "-"][:1]) for line in lines)


def test_what_is_made_small_is_said():
    piece, = pieces(parse("a.md", "# T\n\n    sentei prune --workload prefill:8000\n"))
    assert piece.small() == "sentei prune my-model --workload prefill:512"
    assert "prefill:8000 → prefill:512" in piece.how and "my-model" in piece.how
    assert pieces(parse("a.md", "# T\n\n    sentei trace my-model a b\n"))[0].how == "as it stands"


@pytest.mark.parametrize("text", [
    "```py\n1\n```", "    import torch\n", "```\nfrom a import b\n```", "```bash\nls\n```"])
def test_code_cannot_hide(text):
    with pytest.raises(AssertionError, match=r"a\.md"):
        pieces(parse("a.md", f"# T\n\n{text}\n"))


@pytest.mark.parametrize("text", [
    "```python\n1 / 0\n```", "```python\nassert False\n```", "    sentei prune nothing --workload prefill:8\n",
    "`sentei trace my-model`", "```yaml\nmodel: {}\n```", "    sentei bench attention sparsely\n"])
def test_a_piece_that_fails_is_seen(text, folder, small_cases, sentei):
    found = pieces(parse("a.md", f"# T\n\n{text}\n"))
    with pytest.raises((AssertionError, ZeroDivisionError)):
        for piece in found:
            run(piece, folder, {}, sentei)


REAL = sorted({piece.text for path in PAGES for piece in read(path) if piece.kind == "command"
               and re.match("sentei (bench|trace default)", piece.text)})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("line", REAL)
def test_a_line_as_it_stands(line, tmp_path, monkeypatch, sentei):
    monkeypatch.chdir(tmp_path)
    done = sentei(*shlex.split(line, comments=True)[1:])
    assert done.returncode == 0, done.stderr
