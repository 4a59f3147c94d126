"""The circuit page in a real Chromium: silent, fast, and true to its trace, with the mouse and with the keyboard."""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import CHROMIUM, DRAWN, LINE, Browser, show
from circuits import controlled, edge_words, hostile, large, observed, ran, roomy, spelled, tiled, words

from sentei.axes import connections
from sentei.circuit.capture import capture
from sentei.core.rules import TopK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
NOISE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded")
BOX = "(({{ x, y, width, height }}) => [x, y, width, height])(document.querySelector('{}').getBoundingClientRect())"
CIRCUITS = {
    "two prompts": observed, "every room": ran, "many layers": lambda: large(40, 12),
    "a control": controlled,
    "mirrored": lambda: large(100, 4), "hostile": lambda: observed(hostile, (25, 26)),
    "tiles and pages": lambda: capture(tiled(), [list(range(33))], spelled, write=3),
    "an encoder": lambda: capture(roomy(causal=False, depth=None, connections=connections.Config(
        rule=TopK(3), tile=(1, 1), window=0)), [list(range(7)), list(range(3, 9))], spelled),
}


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path, (1400, 1500)) as lead:
        yield lead


def asked(browser: Browser) -> set[str]:
    """The addresses that were asked for, but for the page's own and the blobs of its exports."""
    found = {event["request"]["url"] for event in browser.told("Network.requestWillBeSent")}
    return {address for address in found if not re.match(r"file:.*/circuit\.html|blob:", address)}


@pytest.mark.parametrize("make", CIRCUITS.values(), ids=CIRCUITS.keys())
def test_silence(make, browser, tmp_path):
    show(browser, tmp_path, make(), "#c=0.1.2&pin=0.1&not=1")
    for key in ("ArrowUp", "ArrowRight", "Enter", "x", "2", "3", "4", "5", "1", "n", "e", "ArrowRight", "Escape", "?"):
        browser.key(key)
    browser.mouse(500, 600)
    colours = browser.run("""(() => { const c = document.getElementById("base");
      const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return new Set(new Uint32Array(d.buffer)).size; })()""")
    assert browser.told(*NOISE) == [] and asked(browser) == set() and colours > 10


def test_noise_would_be_heard(browser, tmp_path):
    show(browser, tmp_path, ran(), change=lambda text: text.replace("</style>", " </style>"))
    assert any("Content Security Policy" in json.dumps(event) for event in browser.told(*NOISE))
    def change(text):
        return re.sub(r"<meta http-equiv[^>]*>", '<img src="http://127.0.0.1:9/asked">', text)
    show(browser, tmp_path, ran(), change=change)
    assert asked(browser) == {"http://127.0.0.1:9/asked"}
    browser.run("console.log('here')")
    assert browser.told("Runtime.consoleAPICalled")


def told_by_mouse(browser: Browser, canvas: str, pattern: str, count: int) -> dict[tuple[str, ...], str]:
    """What the text line says at `count` random points of a canvas, by what `pattern` finds in it."""
    x, y, width, height = browser.run(BOX.format(canvas))
    found, chance = {}, random.Random(0)
    for _ in range(count):
        browser.mouse(x + chance.uniform(0, width), y + chance.uniform(0, height))
        line = browser.run(LINE)
        place = re.match(pattern, line)
        if place:
            found[place.groups()] = line
    return found


CELL = r"(?:([AB]), l|L)ayer (\d+), token (\d+) .*?: (?!kept)"
EDGE = r"(?:([AB]), l|L)ayer (\d+), token (\d+) .*, head (\d+), key (\d+) "


@pytest.mark.parametrize(("name", "points", "least"), [
    ("many layers", 1500, 500), ("two prompts", 400, 50), ("every room", 250, 25), ("tiles and pages", 500, 80),
    ("an encoder", 300, 30), ("mirrored", 300, 80), ("hostile", 300, 50)])
def test_the_line_says_what_the_trace_says(name, points, least, browser, tmp_path):
    circuit = CIRCUITS[name]()
    show(browser, tmp_path, circuit)
    found = told_by_mouse(browser, "#base", CELL, points)
    for (run, layer, token), line in found.items():
        assert line == words(circuit, "AB".index(run or "A"), int(layer), int(token))
    assert len(found) >= least


@pytest.mark.parametrize(("name", "cells", "least"), [
    ("many layers", 12, 500), ("every room", 6, 30), ("tiles and pages", 4, 60), ("an encoder", 4, 30)])
def test_the_line_says_what_the_trace_says_of_edges(name, cells, least, browser, tmp_path):
    circuit, chance, total = CIRCUITS[name](), random.Random(1), 0
    for _ in range(cells):
        number = chance.randrange(len(circuit.runs))
        run = circuit.runs[number]
        layer, token = chance.randrange(len(run.layers)), chance.randrange(len(run.tokens) // 2, len(run.tokens))
        show(browser, tmp_path, circuit, f"?{chance.random()}#c={number}.{layer}.{token}")
        browser.run("document.querySelector('.panel canvas[tabindex]').scrollIntoView()")
        for where, line in told_by_mouse(browser, ".panel canvas[tabindex]", EDGE, 80).items():
            which, *rest = where
            assert line == edge_words(circuit, "AB".index(which or "A"), *map(int, rest))
            total += 1
    assert total >= least


@pytest.mark.parametrize("name", ["two prompts", "every room"])
def test_the_keyboard_walks_where_the_mouse_does(name, browser, tmp_path):
    circuit = CIRCUITS[name]()
    show(browser, tmp_path, circuit)
    mouse, keys = told_by_mouse(browser, "#base", CELL, 800), {}
    browser.mouse(1, 1)
    for number, run in enumerate(circuit.runs):
        browser.key("PageDown")
        browser.key("Home")
        if number:
            browser.key("x")
        for layer in range(len(run.layers)):
            for token in range(len(run.tokens)):
                line = browser.run(LINE)
                keys[re.match(CELL, line).groups()] = line
                assert f"ayer {layer}, token {token} " in line
                browser.key("ArrowRight")
            browser.key("Home")
            browser.key("ArrowUp")
    cells = sum(len(run.layers) * len(run.tokens) for run in circuit.runs)
    assert len(keys) == cells and len(mouse) > 0.8 * cells and keys == keys | mouse
    browser.key("End")
    browser.key("e")
    shape, seen = circuit.runs[-1].layers[0], len(circuit.runs[-1].tokens)
    by_key = {}
    for head in range(shape.heads):
        for step in range(seen):
            browser.key("ArrowRight" if head % 2 == 0 else "ArrowLeft") if step or not head else None
            line = browser.run(LINE)
            by_key[re.match(EDGE, line).groups()] = line
        browser.key("ArrowDown")
    selector = f".panel{'.b' if len(circuit.runs) > 1 else ''} canvas[tabindex]"
    assert len(by_key) == shape.heads * seen
    by_mouse = told_by_mouse(browser, selector, EDGE, 40)
    assert by_mouse and all(by_key[where] == line for where, line in by_mouse.items() if where in by_key)


def test_the_state_is_in_the_address(browser, tmp_path):
    show(browser, tmp_path, observed(), "#c=1.2.7&lens=experts&not=1&pin=0.3,1.4")
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map((one) => one.textContent)"
    assert browser.run(LINE) == words(observed(), 1, 2, 7)
    assert browser.run(pressed) == ["feed-forward", "outside the mass"]
    for key in ("ArrowLeft", "1", "n", "Enter"):
        browser.key(key)
    assert browser.run("location.hash") == "#c=1.2.6&pin=1.4,1.6"
    show(browser, tmp_path, observed(), "#c=9.9.9&lens=none&pin=7.7,x")
    assert browser.run("location.hash") == "#" or "c=" not in browser.run("location.hash")


def test_pins_are_compared(browser, tmp_path):
    """A token of one run pinned against another of the other: the panel tells their agreement, as Python does."""
    from sentei.circuit.agreement import agreement

    circuit = observed()
    show(browser, tmp_path, circuit, "#c=0.1.7&pin=0.7,1.9")
    text = browser.run("document.querySelector('.panel').textContent")
    values = [round(100 * float(value) + 1e-6) for value in agreement(*circuit.runs, [(7, 9)])[1, :, 0]]
    assert [int(value) for value in re.search(
        r"connections (\d+) %, KV heads (\d+) %, feed-forward (\d+) %, depth (\d+) %", text).groups()] == values


def way_words(values) -> str:
    """What the panel should say of agreements [layers, rooms] of a token."""
    told = []
    for name, column in zip(("connections", "KV heads", "feed-forward", "depth"), values.T.tolist(), strict=True):
        differs = [layer for layer, value in enumerate(column) if value < 1]
        where = (f"differs in {len(differs)} of {len(column)} layers, first in layer {differs[0]}" if differs
                 else "nowhere different")
        told.append(f"{name} {int(100 * sum(column) / len(column) + 0.5)} % ({where})")
    return ", ".join(told)


def agreeing_again():
    """Of the last tokens the key/value heads differ in layer 0, and in no later one."""
    circuit = controlled()
    first, second, third = circuit.runs
    tensors = dict(second.tensors)
    for layer in range(3):
        name = f"{layer}.heads.bits"
        tensors[name] = tensors[name].clone()
        tensors[name][8] = first.tensors[name][8] ^ (layer == 0)
    changed = type(second)(**{**vars(second), "tensors": tensors})
    return type(circuit)(**{**vars(circuit), "runs": (first, changed, third)})


def test_a_layer_that_differs_does_not_speak_for_those_behind_it(browser, tmp_path):
    show(browser, tmp_path, agreeing_again(), "#c=0.1.8")
    text = browser.run("document.querySelector('.panel').textContent")
    assert re.search(r"KV heads \d+ % \(differs in 1 of 3 layers, first in layer 0\)", text)


def test_the_facts_name_the_control(browser, tmp_path):
    facts = "document.getElementById('facts').textContent"
    show(browser, tmp_path, controlled())
    assert "control of A“w0 w1 w2 w3 w4 w77 w78 w40 w41 w42”" in browser.run(facts)
    show(browser, tmp_path, observed(), "?without")
    assert "control of A" not in browser.run(facts)


@pytest.mark.parametrize("cell", ["0.1.8", "1.1.8"])
def test_the_panel_says_where_a_token_begins_to_differ_and_what_the_control_does(cell, browser, tmp_path):
    from sentei.circuit.agreement import agreement

    circuit = controlled()
    first, second, third = circuit.runs
    show(browser, tmp_path, circuit, f"#c={cell}")
    text = browser.run("document.querySelector('.panel').textContent")
    assert f"with the other: {way_words(agreement(first, second, [(8, 8)])[..., 0])}" in text
    assert f"“w0 w1 w2 w3 w4 w77 w78 w40 w41 w42”: {way_words(agreement(first, third, [(8, 9)])[..., 0])}" in text
    assert "agreement of A with its control" in browser.run("document.getElementById('legend').textContent")
    show(browser, tmp_path, observed(), "?again#c=0.1.5")  # in the shared prefix, and without a control
    text = browser.run("document.querySelector('.panel').textContent")
    assert "connections 100 % (nowhere different)" in text and "control" not in text


CATCH = """(() => { window.caught = []; URL.createObjectURL = (blob) => { caught.push(blob); return "blob:x"; };
  HTMLAnchorElement.prototype.click = () => {}; })()"""


def picture_of(browser: Browser, folder: Path, circuit, fragment: str) -> ElementTree.Element:
    """The picture that the page exports."""
    show(browser, folder, circuit, fragment)
    browser.run(CATCH)
    browser.run("document.getElementById('svg').click()")
    browser.until("caught.length === 1")
    return ElementTree.fromstring(browser.run("caught[0].text()"))


def ticks(drawn: ElementTree.Element) -> list[float]:
    """How far right of the spine the control's ticks stand: two wide, each in front of one of paper, four wide."""
    nodes, found = list(drawn), []
    title = next(node for node in nodes if node.text == "agreement of A and B")
    spine = float(re.match(r"translate\(([0-9.]+) ", title.get("transform"))[1])
    for back, tick in zip(nodes, nodes[1:], strict=False):
        if (back.tag == tick.tag and back.tag.endswith("rect") and (back.get("width"), tick.get("width")) == ("4", "2")
                and float(tick.get("x")) - float(back.get("x")) == pytest.approx(1)
                and back.get("height") == tick.get("height")):
            found.append(float(tick.get("x")) + 1 - spine)
    return found


def placed(values) -> list[float]:
    """Where ticks of agreements [layers, rooms] stand: columns of 31, of which 27 are the bar."""
    return [31 * room + 27 * value for room, column in enumerate(values.T.tolist()) for value in column]


def test_the_controls_ticks_stand_at_its_agreement_with_a(browser, tmp_path):
    """For all matched tokens where no cell is chosen, for the tokens in question where one is, or where two are pinned;
    and without a control there are none."""
    from sentei.circuit.agreement import agreement, aligned

    circuit = controlled()
    first, _, third = circuit.runs
    means = agreement(first, third, aligned(first, third)).nanmean(-1)
    own = agreement(first, third, [(8, 9)])[..., 0]
    assert ticks(picture_of(browser, tmp_path, circuit, "?1#lens=all")) == pytest.approx(placed(means), abs=0.03)
    for number, place in enumerate(("c=0.1.8", "c=1.1.8")):
        both = ticks(picture_of(browser, tmp_path, circuit, f"?a{number}#{place}"))
        assert both == pytest.approx(placed(means) + placed(own), abs=0.03)
    assert ticks(picture_of(browser, tmp_path, observed(), "?2#c=0.1.8")) == []


def over_it(browser: Browser) -> list[int]:
    """Of what lies over the page's picture, how many pixels there are, and a number made of their colours."""
    return browser.run("""(() => { const c = document.getElementById("over");
      const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data, sums = [0, 0];
      for (let i = 0; i < d.length; i += 4) { sums[0] += d[i + 3] > 0; sums[1] = (sums[1] * 31 + d[i]) % 1000003; }
      return sums; })()""")


def test_pins_in_both_runs_draw_their_agreement(browser, tmp_path):
    """Without a cell, the spine shows the pinned tokens' agreement, of one pin there is none."""
    found = []
    for pins in ("0.7", "0.7,1.9", "0.7,1.8"):
        show(browser, tmp_path, observed(), f"?{pins}#pin={pins}")
        found.append(over_it(browser))
    (one, _), (two, seen), (_, other) = found
    assert two > 5 * one > 0 and seen != other


@pytest.mark.parametrize("name", ["two prompts", "hostile"])
def test_exports(name, browser, tmp_path):
    circuit = CIRCUITS[name]()
    show(browser, tmp_path, circuit, "#c=0.1.5")
    browser.run(CATCH)
    for number, what in enumerate(("csv", "json", "svg", "png")):
        browser.run(f"document.getElementById('{what}').click()")
        browser.until(f"caught.length === {number + 1}")
    table, whole, picture = (browser.run(f"caught[{number}].text()") for number in range(3))
    cells = sum(3 * len(run.tokens) for run in circuit.runs)
    assert table.split("\r\n")[0].startswith("run,layer,token,text,pairs") and len(table.split("\r\n")) == cells + 1
    assert not re.search(r'(^|,)"?[=+@]', table, re.MULTILINE)
    data = json.loads(whole)
    assert data["hash"] and len(data["cells"]) == cells
    assert data["cells"][5]["multiply_adds"] == circuit.runs[0].get(0, "cost")[5, 0]
    drawn = ElementTree.fromstring(picture)
    assert len(drawn) > 300 and not [node for node in drawn.iter() if "script" in node.tag]
    assert browser.run("caught[3].arrayBuffer().then((b) => [...new Uint8Array(b).slice(1, 4)])") == [80, 78, 71]


def test_the_page_is_quick(browser, tmp_path):
    """256 tokens by 30 layers, twice, of random choices that cannot be squeezed."""
    browser.send("Emulation.setDeviceMetricsOverride", width=1440, height=900, deviceScaleFactor=1, mobile=False)
    show(browser, tmp_path, large())
    size, drawn = (tmp_path / "circuit.html").stat().st_size, float(browser.run(DRAWN))
    # Other work on the machine only adds: the best of three rounds counts. A frame lies between two hovers, as it does
    # for a hand: of many in one task Chromium draws what it has noted down all at once, a quarter of a second for 38.
    times = min((browser.run("""(async () => { const stage = document.getElementById("stage");
      const box = document.getElementById("base").getBoundingClientRect(), times = [];
      for (let i = 0; i < 60; i++) {
        await new Promise(requestAnimationFrame);
        const clientX = box.x + box.width * (0.2 + 0.6 * (i * 37 % 60) / 60);
        const clientY = box.y + box.height * (0.1 + 0.8 * (i * 23 % 60) / 60);
        const start = performance.now();
        stage.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY, bubbles: true }));
        times.push(performance.now() - start);
      }
      return times.sort((a, b) => a - b); })()""") for _ in range(3)), key=max)
    print(f"page {size / 1e6:.2f} MB, first drawn {drawn:.0f} ms, hover median {times[30]:.1f} ms, "
          f"95 % {times[57]:.1f} ms, worst {times[-1]:.1f} ms")
    assert size < 8e6 and drawn < 2000 and times[-1] < 50


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(253, 252, 250)"), ("dark", "rgb(20, 22, 26)")])
def test_schemes_and_print(scheme, background, browser, tmp_path):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    show(browser, tmp_path, observed())
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    context = "document.getElementById('base').getContext('2d')"
    corner = f"[...{context}.getImageData(1, 1, 1, 1).data.slice(0, 3)].join(', ')"
    assert browser.run(colour) == background == f"rgb({browser.run(corner)})"
    browser.send("Emulation.setEmulatedMedia", media="print",
                 features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.until(f"{corner} === '253, 252, 250'")
    assert browser.run(colour) == "rgb(253, 252, 250)"
    assert browser.run("getComputedStyle(document.querySelector('.tools')).display") == "none"


def test_a_notebook_frame_draws(browser, tmp_path):
    import torch

    import sentei

    model = roomy()
    with torch.no_grad(), sentei.trace(model) as t:
        model(torch.arange(6)[None])
    (tmp_path / "circuit.html").write_text(f"<!doctype html>{t._repr_html_()}", encoding="utf-8")
    browser.open((tmp_path / "circuit.html").as_uri(), "!!document.querySelector('iframe')")
    browser.key("ArrowUp")
    assert browser.told(*NOISE) == [] and asked(browser) - {"about:srcdoc"} == set()


@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: npm install --no-save axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme, browser, tmp_path):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    show(browser, tmp_path, observed(), "#c=0.1.5")
    browser.key("?")
    browser.run(AXE.read_text(encoding="utf-8"))
    found = browser.run("axe.run().then(({ violations }) => violations.map((one) => [one.impact, one.id, "
                        "one.nodes[0].html.slice(0, 200)]))")
    print(found)
    assert [entry for entry in found if entry[0] in ("serious", "critical")] == []
