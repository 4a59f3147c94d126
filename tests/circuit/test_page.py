"""The page is one file that allows its own script and style alone, and in which every text is text."""

import base64
import hashlib
import html
import json
import re
import zlib
from pathlib import Path

import pytest
from circuits import HOSTILE, controlled, hostile, observed, ran

from sentei.circuit import page
from sentei.circuit.agreement import agreement, aligned
from sentei.circuit.file import bytes_of, tensors_of
from sentei.circuit.page import joined, label, render, together, told, write
from sentei.circuit.run import Circuit, Token
from sentei.core.errors import ResourceError

HERE = Path(page.__file__).parent


def block(text: str, pattern: str) -> str:
    return re.search(pattern, text, re.DOTALL)[1]


def test_policy_allows_its_own_script_and_style_alone():
    text = render(observed())
    policy = html.unescape(block(text, r'Content-Security-Policy" content="(.*?)"'))
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'" and "unsafe" not in policy and "http" not in policy
    for name, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        digest = base64.b64encode(hashlib.sha256(block(text, pattern).encode()).digest()).decode()
        assert directives[name] == f"'sha256-{digest}'"


def test_nothing_in_the_page_leads_elsewhere():
    text = render(observed())
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!\$|')[^\s>]*//", text)
    named = set(re.findall(r"https?://[^\s\"']+", text))
    assert named == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody asks for


@pytest.mark.parametrize("name", [path.name for path in sorted(HERE.glob("*.js")) + [HERE / "page.html"]])
def test_text_is_never_markup_or_code(name):
    source = (HERE / name).read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|setAttribute\(\"on"
                         r"|fetch\(|XMLHttp|WebSocket|import\(|localStorage|cookie", source)


def test_every_script_is_in_the_page():
    assert {path.name for path in HERE.glob("*.js")} == set(page.SCRIPTS)


def test_the_trace_in_the_page_is_the_trace():
    circuit = observed()
    text = render(circuit)
    data = zlib.decompress(base64.b64decode(block(text, r'id="data">(.*?)</script>')))
    head = json.loads(block(text, r'id="trace">(.*?)</script>'))
    assert data == b"".join(map(bytes_of, tensors_of(circuit).values())) and head["bytes"] == len(data)
    dtype, shape, position = head["tensors"]["1.2.cost"]
    assert (dtype, shape) == ("F32", [12, 2])
    assert data[position:position + 96] == bytes_of(circuit.runs[1].tensors["2.cost"])


OBEYED = "a\x1b[2J\u202eb\ud800"


def named(text: str) -> Circuit:
    """A circuit whose every text but those of tokens is `text`."""
    runs = tuple(type(run)(**{**vars(run), "bypasses": (text,)}) for run in ran().runs)
    return Circuit(kind=ran().kind, model=text, rule=text, date=text, versions={text: text}, runs=runs)


@pytest.mark.parametrize(("text", "shown", "version"), [
    (OBEYED, r"a\u001b[2J\u202eb\ud800", r"a\u001b[2J\u202eb\ud800"),
    ("x" * 60_000, "x" * 139 + "…", "x" * 39 + "…")],
    ids=["obeyed", "long"])
def test_every_text_of_the_header_is_a_label(text, shown, version):
    head = json.loads(block(render(named(text)), r'id="trace">(.*?)</script>'))
    assert [head[key] for key in ("model", "rule", "date")] == [shown] * 3
    assert head["versions"] == {version: version} and head["runs"][0]["bypasses"] == [shown]


def test_hostile_text_cannot_leave_its_block():
    text = render(Circuit(**{**vars(observed(hostile, (25, 26))), "model": "</script><script>alert(1)</script>",
                             "rule": "<!--", "versions": {"torch": "</style>"}}))
    assert text.count("<script") == text.count("</script>") == 3 and "<!--" not in text and "alert(1)</" not in text
    block(text, r'id="trace">(.*?)</script>').encode("ascii")
    assert json.loads(block(text, r'id="trace">(.*?)</script>'))["model"] == "</script><script>alert(1)</script>"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_labels_are_short_and_plain_to_see(text):
    shown = label(text)
    shown.encode()
    assert len(shown) <= 40
    assert not re.search(r"[\x00-\x1f\u200b\u200d\u202a-\u202e\u2028\u2066-\u2069\ud800-\udfff]", shown)


@pytest.mark.parametrize(("text", "shown"), [
    (" bat", "bat"), ("bat", "bat"), (" ", "␣"), ("  ", "␣"), ("\n", "↵"), ("a\nb", "a↵b"), ("\x00", "\\u0000"),
    ("\u202eevil", "\\u202eevil"), ("\u0301", "\\u0301"), ("e\u0301", "e\u0301"), ("x" * 41, "x" * 39 + "…"),
    ("x" * 40, "x" * 40), ("剪定", "剪定"), ("", ""),
])
def test_labels(text, shown):
    assert label(text) == shown


@pytest.mark.parametrize(("texts", "whole"), [
    (["a", "<20 e5>", "<89>", "<aa>"], "a 剪"), (["<e5>", "<89 aa>", "<e5>", "<ae 9a>", "!"], "剪定!"),
    (["<e5>", "<89>", "b"], "<e5><89>b"), (["<61>", "<b>"], "<61><b>"), ([], ""),
])
def test_parts_of_characters_are_joined_in_whole_texts(texts, whole):
    assert joined(texts) == whole
    run = ran().runs[0]
    tokens = tuple(Token(id=0, text=text) for text in (texts + [""] * 10)[:10])
    circuit = Circuit(**{**vars(ran()), "runs": (type(run)(**{**vars(run), "tokens": tokens}),)})
    assert told(circuit)["runs"][0]["text"] == whole
    assert f"<title>{html.escape(whole)} · the circuit" in render(circuit)


def test_what_is_told_already_is_not_compared_again(monkeypatch):
    circuit, text, numbers = controlled(), render(controlled()), page.result(controlled())
    both = together(circuit)
    monkeypatch.setattr(page, "together", None)
    assert render(circuit, both) == text and page.result(circuit, both) == numbers


def test_layers_without_a_cost_are_left_out():
    run = ran().runs[0]
    def density(*layers):
        kept = {name: part for name, part in run.tensors.items()
                if not name.endswith("cost") or int(name[0]) in layers}
        return page.result(Circuit(**{**vars(ran()), "runs": (type(run)(**{**vars(run), "tensors": kept}),)}))
    done, dense = run.get(1, "cost").double().sum(0).tolist()
    assert density(1)["multiply_adds"] == [pytest.approx(done / dense)] and density()["multiply_adds"] == [1.0]


def test_together_is_the_agreement():
    circuit = observed()
    both = together(circuit)
    pairs = aligned(*circuit.runs)
    means = agreement(*circuit.runs, pairs).nanmean(-1)
    assert both["shared"] == 6 and both["differences"] == 0 and both["pairs"] == pairs
    assert both["agreement"][1][0] == pytest.approx(float(means[1, 0]), abs=1e-4)
    assert together(ran()) is None and told(ran())["together"] is None


def test_a_third_run_is_the_control_of_the_first():
    circuit = controlled()
    first, second, third = circuit.runs
    both, means = together(circuit), agreement(first, third, aligned(first, third)).nanmean(-1)
    assert both["control"]["pairs"] == aligned(first, third) and both["pairs"] == aligned(first, second)
    assert both["control"]["agreement"][1][2] == pytest.approx(float(means[1, 2]), abs=1e-4)
    assert both["control"]["agreement"] != both["agreement"] and together(observed())["control"] is None
    told_of = page.result(circuit)["together"]["control"]
    assert told_of["connections"] == pytest.approx(float(means[:, 0].mean()), abs=1e-4)


def test_the_fingerprint_is_of_words_and_numbers():
    circuit = ran()
    renamed = Circuit(**{**vars(circuit), "model": "another"})
    run = circuit.runs[0]
    cost = run.tensors["0.cost"].clone()
    cost[0, 0] += 1
    other = type(run)(**{**vars(run), "tensors": {**run.tensors, "0.cost": cost}})
    changed = Circuit(**{**vars(circuit), "runs": (other,)})
    assert len({page.fingerprint(one) for one in (circuit, renamed, changed)}) == 3
    assert page.fingerprint(circuit) == page.fingerprint(ran())


def test_a_page_too_large_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    with pytest.raises(ResourceError, match="shorter prompt"):
        write(ran(), tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_surrogates_in_every_text(tmp_path):
    circuit = ran()
    run = circuit.runs[0]
    tokens = tuple(Token(id=token.id, text="\ud800") for token in run.tokens)
    write(Circuit(**{**vars(circuit), "runs": (type(run)(**{**vars(run), "tokens": tokens}),)}), tmp_path / "a.html")
    assert "\\ud800" in (tmp_path / "a.html").read_text(encoding="utf-8")
