"""The pictures of the rooms: SVG with its own light and dark colours, so that they read the same on any page.

    python -m docs.builder.pictures          # writes docs/rooms/NAME.svg again; a test compares

Choices in them are drawn from a seeded generator: they show the form of a choice, not a measured one.
"""

import random
from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "rooms"
WIDTH = 840
STYLE = """
  .paper { fill: #fbfaf7; stroke: #c9ced4 } .ink { fill: #1b2733 } .soft { fill: #56616c } .kept { fill: #b3410e }
  .part { fill: #1f6496 } .pale { fill: #b5cfe3 } .none { fill: none; stroke: #9aa3ab; stroke-dasharray: 2 3 }
  .line { fill: none; stroke: #56616c; stroke-width: 1.5 } .road { fill: none; stroke: #b3410e; stroke-width: 2 }
  .gone { fill: none; stroke: #9aa3ab; stroke-width: 1.5; stroke-dasharray: 2 4 } .white { fill: #ffffff }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1d2126; stroke: #3d444b } .ink { fill: #e9e6df } .soft { fill: #a6adb4 } .kept { fill: #f2855a }
    .part { fill: #78b4dd } .pale { fill: #35546c } .none, .gone { stroke: #69727a } .line { stroke: #a6adb4 }
    .road { stroke: #f2855a } .white { fill: #10151a }
  }
"""


class Drawing:
    """Marks on a card `height` units high.

    Args:
        title, told: what it is, and what it shows, for those who do not see it.
    """

    def __init__(self, height: int, title: str, told: str):
        self.height, self.title, self.told, self.marks = height, title, told, []

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A rectangle."""
        self.marks.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')

    def words(self, x: float, y: float, text: str, kind: str = "soft", size: int = 13, anchor: str = "start") -> None:
        """A line of text."""
        self.marks.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">'
                          f"{escape(text)}</text>")

    def path(self, d: str, kind: str = "line") -> None:
        """A line."""
        self.marks.append(f'<path class="{kind}" d="{d}"/>')

    def head(self, x: float, title: str, below: str) -> None:
        """The two lines over a panel."""
        self.words(x, 38, title, "ink", 17)
        self.words(x, 59, below)

    def source(self) -> str:
        """The file's text."""
        marks = "\n".join(f"  {mark}" for mark in self.marks)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img"\n'
                f'     aria-labelledby="title description" font-family="system-ui, sans-serif">\n'
                f'  <title id="title">{escape(self.title)}</title>\n'
                f'  <desc id="description">{escape(self.told)}</desc>\n'
                f"  <style>{STYLE}  </style>\n"
                f'  <rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="10"/>\n'
                f"{marks}\n</svg>\n")


def triangle(draw: Drawing, x: float, size: int, count: int, keep: Callable[[int, int], bool]) -> None:
    """Queries down, keys across, `size` a cell; what is not kept is empty."""
    for row in range(count):
        for column in range(row + 1):
            draw.box(x + column * size, 80 + row * size, size - 2, size - 2,
                     "kept" if keep(row, column) else "none")


def connections() -> Drawing:
    """Tokens, blocks of them, and the pages a decoded token reads."""
    draw = Drawing(316, "connections", "Three panels. A triangle of single tokens by single tokens of which each row "
                   "keeps three; a triangle of blocks in which the first column, the diagonal and some others are "
                   "kept; and one row of pages, of which a decoded token reads five of sixteen.")
    chance = random.Random(3)
    kept = [{row, *chance.sample(range(row + 1), min(row + 1, 2))} for row in range(14)]
    draw.head(24, "token by token", "tile 1 × 1, TopK(3)")
    triangle(draw, 24, 14, 14, lambda row, column: column in kept[row])
    blocks = [{0, row, *chance.sample(range(row + 1), min(row + 1, 1 + row // 3))} for row in range(7)]
    blocks[6] = set(range(7))
    draw.head(282, "block by block", "a prompt: 64 queries share a choice")
    triangle(draw, 282, 28, 7, lambda row, column: column in blocks[row])
    draw.head(550, "page by page", "one decoded token, pages of 16 keys")
    for page in range(16):
        draw.box(550 + page * 16.5, 80, 14, 40, "kept" if page in (0, 3, 9, 14, 15) else "none")
    draw.words(550, 144, "first page and newest: always")
    draw.words(550, 166, "the others: by an upper bound of the")
    draw.words(550, 184, "logits, from the minimum and maximum")
    draw.words(550, 202, "of each channel of the page")
    for x in (24, 282):
        draw.words(x, 298, "keys →", size=12)
    return draw


def experts() -> Drawing:
    """Tokens by groups of neurons, and where the choice and the weight come from."""
    draw = Drawing(300, "experts", "Left: six tokens by eight experts; each row keeps two, as bars as high as "
                   "their weights. Right: the same feed-forward layer cut in two wide experts, in eight, and in single "
                   "neurons.")
    chance = random.Random(5)
    draw.head(24, "each token keeps two experts of eight", "a bar is as high as the expert's weight")
    for token, word in enumerate(("the", "bat", "flew", "out", "of", "cave")):
        draw.words(66, 104 + token * 32, word, "ink", 13, "end")
        chosen = dict(zip(chance.sample(range(8), 2), (0.7, 0.4), strict=True))
        for expert in range(8):
            draw.box(80 + expert * 38, 84 + token * 32, 34, 26, "none")
            if expert in chosen:
                draw.box(80 + expert * 38, 84 + token * 32 + 26 * (1 - chosen[expert]), 34, 26 * chosen[expert], "kept")
    draw.words(80, 286, "experts →", size=12)
    draw.head(470, "an expert is some neurons", "the same layer, cut three ways")
    for row, (unit, kept, text) in enumerate((
            (84, {1}, "a whole feed-forward layer each (Switch, Mixtral)"),
            (24, {0, 5, 9}, "small ones, one of them kept by all (DeepSeekMoE)"),
            (4, set(random.Random(1).sample(range(84), 20)), "single neurons (contextual sparsity)"))):
        y = 84 + row * 68
        for place in range(336 // unit):
            shared = row == 1 and place == 0
            draw.box(470 + place * unit, y, unit - (2 if unit > 4 else 1), 30,
                     "part" if shared else "kept" if place in kept else "none")
        draw.words(470, y + 48, text)
    return draw


def heads() -> Drawing:
    """Query heads over the key/value heads they share."""
    draw = Drawing(250, "heads", "Eight query heads over eight, two and one key/value heads. The cache is as large as "
                   "the key/value heads are many: 0, 75 and 87.5 per cent are saved.")
    for panel, (groups, name, saved) in enumerate(((8, "multi-head", "nothing saved"),
                                                   (2, "grouped", "75 % of the cache saved"),
                                                   (1, "multi-query", "87.5 % saved"))):
        x = 24 + panel * 274
        draw.head(x, f"{name}: {groups} of 8", saved)
        for head in range(8):
            group = head * groups // 8
            at, to = x + head * 29 + 11, x + (group + 0.5) * 232 / groups - 3
            draw.path(f"M{at:g} 108C{at:g} 140 {to:g} 134 {to:g} 166")
            draw.box(x + head * 29, 84, 22, 24, "part")
        for group in range(groups):
            draw.box(x + (group + 0.5) * 232 / groups - 14, 166, 22, 24, "kept")
        draw.words(x, 216, "queries above, keys and values below", size=12)
    return draw


def rank() -> Drawing:
    """A frozen matrix, its low-rank change, and the directions each token keeps."""
    draw = Drawing(272, "rank", "Left: a frozen square matrix plus a tall matrix B times a flat matrix A. Right: four "
                   "tokens by eight directions, each token keeps a few of them.")
    draw.head(24, "y = W x + s · B A x", "W is frozen; A and B are all that is trained")
    draw.box(24, 84, 150, 150, "pale")
    draw.words(99, 164, "W  (d × d)", "ink", 14, "middle")
    draw.words(196, 166, "+", "ink", 22, "middle")
    draw.box(222, 84, 18, 150, "kept")
    draw.words(231, 252, "B", "ink", 14, "middle")
    draw.words(258, 166, "·", "ink", 22, "middle")
    draw.box(276, 150, 150, 18, "kept")
    draw.words(351, 192, "A", "ink", 14, "middle")
    draw.head(500, "a rule keeps directions, by token", "score: log of the size of a·x times that of b")
    chance = random.Random(2)
    for token in range(4):
        draw.words(530, 104 + token * 36, f"x{token + 1}", "ink", 13, "end")
        kept = set(chance.sample(range(8), (2, 5, 1, 3)[token]))
        for direction in range(8):
            draw.box(544 + direction * 33, 84 + token * 36, 29, 28, "kept" if direction in kept else "none")
    draw.words(544, 246, "directions →", size=12)
    return draw


def depth() -> Drawing:
    """Roads of tokens through blocks, every other of which some of them skip."""
    draw = Drawing(286, "depth", "Eight tokens go up through four blocks. Blocks one and three take all of them; two "
                   "and four take two of eight, and the others pass beside them along a dashed line.")
    draw.head(24, "tokens pass or skip a block", "Mixture-of-Depths: every other block, Capacity(0.25)")
    chance = random.Random(4)
    kept = [set(range(8)), set(chance.sample(range(8), 2)), set(range(8)), set(chance.sample(range(8), 2))]
    for block in range(4):
        y = 222 - block * 44
        draw.words(24, y + 19, f"block {block + 1}")
        for token in range(8):
            x = 92 + token * 44
            inside = token in kept[block]
            draw.box(x, y, 34, 28, "kept" if inside else "none")
            if block < 3:
                draw.path(f"M{x + 17} {y}v-16", "road" if token in kept[block + 1] else "gone")
    draw.words(92, 274, "tokens →", size=12)
    draw.head(500, "who decides", "the choice of training sees later tokens")
    for row, text in enumerate((
            "training: the Capacity highest scores along", "the sequence; the score also weighs what a",
            "block adds, and so is learned", "", "generation: a logistic regression on x, trained",
            "beside it, asks: would this token be kept?", "A skipped token has no key or value here.")):
        draw.words(500, 96 + row * 22, text)
    return draw


def weights() -> Drawing:
    """Zeros anywhere, two of four, and whole columns."""
    draw = Drawing(270, "weights", "Three matrices of which half is kept: single weights anywhere, two of every "
                   "four in a row, and whole columns, which leaves a smaller matrix.")
    chance = random.Random(6)
    for panel, (name, told) in enumerate((("weights anywhere", "half are zeros: no faster"),
                                          ("two of four", "regular, and no faster here"),
                                          ("columns", "half as wide: faster"))):
        x = 24 + panel * 274
        draw.head(x, name, told)
        columns = set(chance.sample(range(12), 6))
        for row in range(8):
            fours = {4 * four + place for four in range(3) for place in chance.sample(range(4), 2)}
            for column in range(12):
                kept = (chance.random() < 0.5, column in fours, column in columns)[panel]
                draw.box(x + column * 19, 84 + row * 19, 16, 16, "kept" if kept else "none")
        if panel == 2:
            draw.words(x, 256, "6 of 12 columns are computed", size=12)
    return draw


def channels() -> Drawing:
    """Feature maps, their gates, and those that the next convolution reads."""
    draw = Drawing(250, "channels", "Eight feature maps, a gate for each as a bar, and the three maps that the next "
                   "convolution reads.")
    gates = (0.9, 0.2, 0.6, 0.1, 0.35, 0.8, 0.15, 0.3)
    draw.head(24, "gates from the means of all maps", "squeeze-and-excitation: every map, times its gate")
    draw.head(500, "a rule keeps some", "TopK(3): the next convolution reads three")
    for place, gate in enumerate(gates):
        x, y = 24 + place * 52, 112
        draw.box(x, y, 42, 42, "part" if gate > 0.5 else "pale")
        draw.box(x, 216 - 46 * gate, 42, 46 * gate, "kept")
        x = 500 + place * 39
        draw.box(x, y, 33, 33, "kept" if gate in sorted(gates)[-3:] else "none")
    draw.words(24, 102, "maps", size=12)
    draw.words(24, 234, "gates", size=12)
    draw.words(500, 176, "Saved only where all images of a call keep")
    draw.words(500, 196, "the same maps: one image, or a fixed choice.")
    return draw


PICTURES = (connections, experts, heads, rank, channels, depth, weights)


def main(folder: Path = FOLDER) -> None:
    """Writes every picture."""
    for picture in PICTURES:
        (folder / f"{picture.__name__}.svg").write_text(picture().source(), encoding="utf-8")


if __name__ == "__main__":
    main()
