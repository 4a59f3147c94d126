"""The model card: its numbers are the run's, and nothing a stranger wrote is markup, neither here nor for the hub."""

import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tiny import save_tiny_encoder

from sentei.conversion.card import CALLS, CARD, fenced, licence_in, render, words

SIDE = {"seconds": 10.88, "tokens_per_second": 72634.4, "perplexity": 12.345}
RESULT = {"model": "tiny", "workload": "prefill:4096", "dtype": "float32", "dense": SIDE,
          "pruned": {**SIDE, "seconds": 8.7, "tokens_per_second": 470.8, "perplexity": 12.36},
          "speedup": 1.25, "quality": 0.9988, "density": 0.381, "plan": [{"layer": 0}],
          "does": ["attention computes 38 % of its connections", "networks keep half"],
          "rooms": {"connections": {"layers": 28, "seconds": 0.65, "share": 0.3},
                    "unforeseen": {"layers": 0, "seconds": 1.74, "share": 0.8},
                    "native": {"layers": 30, "seconds": -0.22, "share": -0.1}}}
DETAILS = {"meaning": "dense perplexity ÷ pruned perplexity", "met": True, "reason": "",
           "quality_interval": [0.995, 1.002], "speedup_interval": [1.21, 1.3],
           "source": "tiny (a local folder)", "licence": "apache-2.0", "command": "sentei prune tiny --out faster",
           "text": {"name": "a.txt", "sha256": "ab" * 32, "tokens": {"choose": 8192, "verify": 8192}},
           "environment": {"processor": "a processor", "threads": "2"}, "verify_attempts": 1, "date": "2026-11-27",
           "rung": "C"}
HEALED = {"kept": True, "reason": "x", "quality_unhealed": 0.9, "minutes": 10, "table": [],
          "unhealed": {"quality": 0.962, "speedup": 3.14}, "relaxed": {
              "asked": 0.95, "quality": 0.9292, "share": 0.3,
              "probe": {"bound": 0.9025, "unhealed": 0.9057, "healed": 0.933, "minutes": 2.41}}}
RECEIPT = {"difference": 1.5e-6, "tolerance": 1e-3, "met": True}
HOSTILE = [
    "<script>alert(1)</script>", "[a](javascript:alert(1))", "![a](https://example.org/a.png)", "`code` ```\n# head",
    "a | b\n|---|", "<!--", "https://example.org", "**bold** _it_ ~~no~~", "\x1b]0;evil\x07", "\u202eevil",
    "&lt;b&gt; &#60;", "- a\n1. b\n> c", "a@example.org", "\\", "\\\\[a](b)", "---\nlicense: evil\n---", "$x$",
    "a\r\n\tb", "{{ x }}", "</td>"]


@pytest.fixture
def encoder(tmp_path) -> dict:
    folder = save_tiny_encoder(tmp_path / "bert", max_position_embeddings=128)
    return {"model": folder, "workload": "prefill:96"}


class Shown(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not attributes or (tag, attributes) == ("code", [("class", "language-python")])

    def handle_comment(self, data):
        raise AssertionError("a comment")

    def handle_data(self, data):
        self.text += data


def page_of(card: str) -> Shown:
    """What a viewer shows that lets HTML through and makes links of addresses."""
    body = card.split("\n---\n", 1)[1]
    return Shown(MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(body))


def test_the_numbers_are_those_of_the_run():
    page = page_of(render(RESULT, DETAILS, RECEIPT))
    first = page.text.strip().split("\n")[1]
    assert first == ("Attention computes 38 % of its connections; networks keep half: 1.25 times as fast as dense at "
                     "quality 0.9988, prefill:4096, float32. The bound is met.")
    for told in ("quality 0.9988", "0.9950 to 1.0020", "1.21 to 1.30", "10.9", "8.7", "12.35",
                 "72,600", "0.381", "sentei prune tiny --out faster", "1.5e-06, of 0.001 allowed",
                 "Licence: apache-2.0", "a processor",
                 "none shared: choose 8,192, verify 8,192", "The bound is met", "2026-11-27", "Without sentei"):
        assert told in page.text, told
    assert page.tags.count("table") == 2 and page.tags.count("tr") == 7 + 4 and "td" in page.tags


def test_where_the_time_went_is_told_by_room_and_what_was_not_foreseen_last():
    card = render(RESULT, DETAILS, RECEIPT)
    assert re.findall(r"^\| ([^|]*) \| (\d*) \| (-?[\d.]+) \| (-?[\d.]+) \|$", card, re.M) == [
        ("connections", "28", "0.65", "0.30"), ("kernels of sentei's own, and exact attention", "30", "-0.22", "-0.10"),
        ("more than was foreseen, or less", "", "1.74", "0.80")]


def test_of_a_plan_that_changes_nothing_nothing_is_promised():
    dense = RESULT | {"plan": [], "rooms": {}, "does": ["nothing is changed"]}
    page = page_of(render(dense, DETAILS, RECEIPT))
    assert "Nothing is changed: " in page.text and "Nothing is pruned" in page.text
    assert "Without sentei" not in page.text and page.tags.count("table") == 1


@pytest.mark.parametrize("rung, library", [("A", "transformers"), ("B", "sentei"), ("C", "transformers")])
def test_the_hub_is_told_which_library_loads_it(rung, library):
    assert f"\nlibrary_name: {library}\n" in render(RESULT, DETAILS | {"rung": rung}, RECEIPT)


@pytest.mark.parametrize("healed", [False, True])
@pytest.mark.parametrize("rung, told", [("A", "an ordinary, smaller model"), ("B", "does not load"),
                                        ("C", "Memory does not shrink")])
def test_what_the_folder_is_without_sentei_depends_on_its_rung(rung, told, healed):
    kept = {"healed": HEALED | {"kept": healed}}
    text = page_of(render(RESULT | kept, DETAILS | {"rung": rung}, RECEIPT)).text
    assert (told in text) == (rung != "C" or not healed)
    assert ("The weights are those of the base model, with" in text) == (rung == "C" and not healed)
    assert ("the dense model, no faster" in text) == (rung == "C" and not healed)
    assert ("changed by healing" in text) == healed


@pytest.mark.parametrize("relaxed", [HEALED["relaxed"], None])
def test_what_was_relaxed_for_healing_is_said_and_what_there_is_without(relaxed):
    text = page_of(render(RESULT | {"healed": HEALED | {"relaxed": relaxed}}, DETAILS, RECEIPT)).text
    assert "as measured above: 0.9000" in text and "without healing: 3.14 times as fast at 0.9620" in text
    told = ("under a bound of 0.9292 in place of 0.95", "2.4 of the minutes brought a plan from 0.9057 to 0.9330",
            "30% of the nats")
    assert all((words in text) == (relaxed is not None) for words in told)


def test_what_is_not_met_or_not_known_is_said():
    page = page_of(render(RESULT | {"quality_without_lookahead": 0.97},
                          DETAILS | {"met": False, "reason": "no plan reaches 0.999", "licence": None}, RECEIPT))
    assert "The bound is not met: no plan reaches 0.999." in page.text
    assert "Licence: not known to sentei" in page.text and "0.9700" in page.text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_stranger_s_text_is_its_letters(text):
    plain = page_of(render(RESULT, DETAILS, RECEIPT))
    card = render(RESULT | {"model": text}, DETAILS | {
        "source": text, "licence": text, "command": f"sentei prune {text}", "text": DETAILS["text"] | {"name": text},
        "environment": {text: text}}, RECEIPT)
    page = page_of(card)
    assert page.tags == plain.tags
    assert page.text.count("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)) >= 5
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)
    assert card.split("\n---\n", 1)[0] == "---\nlibrary_name: transformers\ntags:\n- sentei\n- pruning"


def test_text_is_shortened_and_code_cannot_be_ended():
    assert len(words("a" * 1000)) == 200
    assert fenced("a ```` b").startswith("`````\n") and fenced("a ```` b").endswith("\n`````")
    assert html.unescape(Shown(MarkdownIt().render(fenced("x\n```\n<b>"))).text).strip() == "x\\n```\\n<b>"


@pytest.mark.parametrize("content, licence", [
    ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"), ("---\nlicense: 'mit'\ntags: [a]\n---\n", "mit"),
    ("---\r\nlicense: mit\r\n---\r\n", "mit"), ("---\ntags: [a]\n---\nlicense: evil\n", None), ("license: mit\n", None),
    ("---\nlicense: [a, b]\n---\n", None), ("---\nlicense: a b\n---\n", None), ("", None),
    ("---\nlicense: mit\n", None),
    ("---\n" + "a: b\n" * 10_000 + "license: mit\n---\n", None), ("\x00\xff", None)],
    ids=lambda value: repr(value)[:30])
def test_a_licence_is_a_word_of_the_front_matter(tmp_path, content, licence):
    (tmp_path / CARD).write_text(content, encoding="latin-1", newline="")
    assert licence_in(tmp_path / CARD) == licence


def test_prune_writes_it_and_takes_the_base_model_s_licence(prune, subject, tmp_path):
    model = shutil.copytree(Path(subject["model"]), tmp_path / "model")
    (model / CARD).write_text("---\nlicense: cc-by-4.0\n---\n")
    assert prune(model=model).returncode == 0
    card = (tmp_path / "out" / CARD).read_text()
    assert "license: cc-by-4.0\n" in card and "Licence: cc\\-by\\-4\\.0" in card and "2.00 times as fast" in card
    assert str(tmp_path / "out") in card


@pytest.mark.parametrize("job, call", [("subject", "perplexity"), ("encoder", "cosine")])
def test_what_the_card_says_to_do_works(prune, tmp_path, request, job, call, capfd):
    assert prune(**request.getfixturevalue(job)).returncode in (0, 1)
    code, = re.findall("```python\n(.*?)\n```", (tmp_path / "out" / CARD).read_text(), flags=re.S)
    assert code.endswith(CALLS[call])
    exec(code.replace("path/of/this/folder", str(tmp_path / "out")), {})  # noqa: S102
    assert capfd.readouterr().out.strip()


def test_a_card_of_other_weights_is_not_left(prune, tmp_path, monkeypatch):
    assert prune().returncode == 0
    wrong = {"met": False, "difference": 1.0, "tolerance": 0.1}
    monkeypatch.setattr("sentei.conversion.export.check_afresh", lambda _: wrong)
    assert prune("--json").returncode == 3
    assert not (tmp_path / "out" / CARD).exists()
