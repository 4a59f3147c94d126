"""What the circuit page says in a real Chromium: no number that is false, no text that moves its neighbours."""

from dataclasses import replace

import pytest
import torch
from browser import CHROMIUM, LINE, Browser, show
from circuits import observed, ran, spelled
from tiny import tiny_model

from sentei.axes import rank
from sentei.circuit.capture import capture
from sentei.circuit.run import Circuit
from sentei.core.rules import TopK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path, (1400, 1500)) as lead:
        yield lead


def sized(circuit, *codes: int):
    """The circuit with these codes of the sizes of layer 0's sublayers at the last token of the first run."""
    run, name = circuit.runs[0], "0.depth.weights"
    changed = run.tensors[name].clone()
    changed[-1] = torch.tensor(codes, dtype=torch.uint8)
    other = type(run)(**{**vars(run), "tensors": run.tensors | {name: changed}})
    return type(circuit)(**{**vars(circuit), "runs": (other, *circuit.runs[1:])})


@pytest.mark.parametrize(("circuit", "codes", "told"), [
    (observed, (255, 254), "moves the token by at least 100 % of its length, the feed-forward layer by 99 %"),
    (observed, (254, 255), "moves the token by 99 % of its length, the feed-forward layer by at least 100 %"),
    (ran, (255, 255), "its score at least 1.00"), (ran, (254, 254), "its score 0.99")])
def test_a_size_that_was_cut_is_told_as_a_least(circuit, codes, told, browser, tmp_path):
    show(browser, tmp_path, sized(circuit(), *codes), f"#c=0.0.{len(circuit().runs[0].tokens) - 1}")
    text = browser.run("document.querySelector('.panel').textContent")
    assert text.endswith(told) and text.count("at least") == codes.count(255) - (circuit is ran and codes[0] == 255)


def test_names_do_not_turn_the_line_they_stand_in(browser, tmp_path):
    text = "a\x1b\u202eb"
    runs = tuple(replace(run, bypasses=(text,)) for run in ran().runs)
    show(browser, tmp_path, replace(ran(), model=text, rule=text, date=text, versions={text: text}, runs=runs))
    about, small, whole = browser.run("""["#about", "#small", "html"].map(
      (name) => document.querySelector(name).textContent.replace(/<script.*/s, ""))""")
    assert about.count(r"a\u001b\u202eb") == 5 and r"ran dense: a\u001b\u202eb." in small
    assert not {"\x1b", "\u202e"} & {*about, *small, *whole}


def test_the_keyboard_enters_the_heads_by_keys_of_the_cell_that_is_chosen(browser, tmp_path):
    for cell, place in (("1.2.4", "B, layer 2"), ("0.2.4", "A, layer 2")):
        show(browser, tmp_path, observed(), f"?{cell}#c={cell}")
        assert browser.run("document.querySelectorAll('.panel canvas[tabindex]').length") == 2
        browser.key("e")
        browser.key("ArrowRight")
        assert browser.run(LINE).startswith(f"{place}, token 4 ") and ", head 0, key 0 " in browser.run(LINE)


def ranked() -> Circuit:
    """A circuit of a model with adapters in the attention of every layer."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = rank.from_dense(layer.self_attn.q_proj, rank.Config(rule=TopK(2), rank=4))
    return capture(model, [list(range(6))], spelled)


@pytest.mark.parametrize(("make", "chosen"), [(observed, "connections"), (ranked, "rank")])
def test_the_lens_of_the_rank_is_there_where_adapters_are(make, chosen, browser, tmp_path):
    pressed = "[...document.querySelectorAll('#lenses [aria-pressed=true]')].map((one) => one.dataset.lens)"
    show(browser, tmp_path, make())
    browser.key("2")
    browser.key("6")
    assert browser.run(pressed) == [chosen]
    assert ("lens: rank" in browser.run("document.getElementById('keys').textContent")) is (chosen == "rank")
    show(browser, tmp_path, make(), "?again#lens=rank")
    assert browser.run(pressed) == ["rank" if chosen == "rank" else "all"]
