"""The circuit page: one HTML file that holds a trace and draws it, and asks for nothing.

The trace's tensors are deflated and stand in the page as base64, its words as JSON whose every letter is ASCII. The
page puts text into elements as text alone, and its policy allows the script and the style it was made with, by hash.
"""

import base64
import hashlib
import html
import itertools
import json
import re
import unicodedata
import zlib
from pathlib import Path
from string import Template

from sentei.circuit.agreement import ROOMS, agreement, aligned, prefix_differences, shared_prefix
from sentei.circuit.file import DTYPES, bytes_of, header_of, tensors_of
from sentei.circuit.run import Circuit, Run
from sentei.core.errors import ResourceError
from sentei.core.storage import write_text

HERE = Path(__file__).parent
SCRIPTS = ("data.js", "words.js", "pen.js", "grid.js", "panel.js", "page.js")
MAX_LABEL, MAX_TEXT = 40, 140  # characters shown of a token or a version, and of any other text
MAX_BYTES = 64 << 20  # of a page: a browser would hardly open more
_BYTES = re.compile(r"<([0-9a-f]{2}(?: [0-9a-f]{2})*)>")
# What in a JSON text could end the script element it stands in, or a line of JavaScript.
_ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write(circuit: Circuit, path: Path, both: dict | None = None) -> None:
    """Writes the page of a circuit, whole or not at all; `both`: what `together` says, where it is known.

    Raises:
        ResourceError: a page above MAX_BYTES, a full disk, or a place that cannot be written.
    """
    write_text(path, render(circuit, both))


def render(circuit: Circuit, both: dict | None = None) -> str:
    """The page as HTML, pure ASCII but for what the page itself says; `both`: what `together` says, where it is known.

    Cost: that of `together`, unless it is given, and a compression.
    """
    data = base64.b64encode(zlib.compress(b"".join(map(bytes_of, tensors_of(circuit).values())), 9)).decode()
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    policy = ("default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
              f"script-src {_hash(script)}; style-src {_hash(style)}")
    page = Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=html.escape(policy), title=html.escape(_title(circuit)), style=style, script=script, data=data,
        trace=_json(told(circuit, both)))
    if len(page) > MAX_BYTES:
        raise ResourceError("the page", expected=f"at most {MAX_BYTES >> 20} MB", got=f"{len(page) >> 20} MB",
                            do="trace a shorter prompt")
    return page


def told(circuit: Circuit, both: dict | None = None) -> dict:
    """What the page knows but for the tensors' bytes: the header, a table of tensors, and what two runs share.

    Every text of the header is a label: whoever wrote a trace named its model, and dated it.
    """
    header, position, table = header_of(circuit), 0, {}
    for name, tensor in tensors_of(circuit).items():
        size = tensor.numel() * tensor.element_size()
        table[name] = [DTYPES[tensor.dtype], list(tensor.shape), position]
        position += size
    for run in header["runs"]:
        run["text"] = label(joined([text for _, text in run["tokens"]]), MAX_TEXT)
        run["tokens"] = [[number, label(text)] for number, text in run["tokens"]]
        run["following"] = [[label(text), chance] for text, chance in run["following"]]
        run["bypasses"] = [label(reason, MAX_TEXT) for reason in run["bypasses"]]
    header |= {key: label(header[key], MAX_TEXT) for key in ("model", "rule", "date")}
    header["versions"] = {label(name): label(version) for name, version in circuit.versions.items()}
    return {**header, "tensors": table, "bytes": position, "hash": fingerprint(circuit),
            "together": together(circuit) if both is None else both}


def together(circuit: Circuit) -> dict | None:
    """The comparison of two runs: matched tokens, the shared prefix, and agreement by layer and room.

    `control`: the same of the first run and the third; None where there is no third.
    Cost: for each layer a bool for each head, token and key of both runs; half a minute for two of 1,500 tokens.
    """
    if len(circuit.runs) < 2:
        return None
    first, second, *third = circuit.runs
    return {**_matched(first, second), "shared": shared_prefix(first, second),
            "differences": prefix_differences(first, second), "control": _matched(first, *third) if third else None}


def _matched(first: Run, other: Run) -> dict:
    """Matched tokens, and over them the mean agreement by layer and room."""
    pairs = aligned(first, other)
    means = agreement(first, other, pairs).nanmean(-1)
    return {"pairs": pairs, "agreement": [[_number(value) for value in row] for row in means]}


def _number(value: object) -> float | None:
    number = float(value)
    return None if number != number else round(number, 4)


def result(circuit: Circuit, both: dict | None = None) -> dict:
    """The page's main numbers, as a JSON object of schema sentei.traced/1; `both`: what `together` says, or None."""
    both = together(circuit) if both is None else both
    if both is not None:
        both = {"shared": both["shared"], "differences": both["differences"], "matched": len(both["pairs"]),
                "agreement": _by_room(both), "control": both["control"] and _by_room(both["control"])}
    return {"schema": "sentei.traced/1", "model": circuit.model, "kind": circuit.kind, "rule": circuit.rule,
            "tokens": [len(run.tokens) for run in circuit.runs], "multiply_adds": list(map(_density, circuit.runs)),
            "hash": fingerprint(circuit), "together": both}


def _by_room(matched: dict) -> dict[str, float | None]:
    """The mean agreement over layers."""
    columns = zip(ROOMS, zip(*matched["agreement"], strict=True), strict=True)
    means = {room: [value for value in values if value is not None] for room, values in columns}
    return {room: sum(values) / len(values) if values else None for room, values in means.items()}


def _density(run: Run) -> float:
    """Multiply-adds done ÷ dense, over all tokens and the layers that tell their cost; 1 where none does."""
    costs = [run.get(layer, "cost") for layer in range(len(run.layers))]
    done, dense = (sum(float(cost[:, place].double().sum()) for cost in costs if cost is not None) for place in (0, 1))
    return done / dense if dense else 1.0


def fingerprint(circuit: Circuit) -> str:
    """The SHA-256 of a trace: of its header and its tensors."""
    digest = hashlib.sha256(json.dumps(header_of(circuit)).encode())
    for tensor in tensors_of(circuit).values():
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def label(text: str, longest: int = MAX_LABEL) -> str:
    """A token, a name or a whole text, as a reader can see it, at most `longest` characters.

    One space in front is left away, as most words have it; a line break is shown as ↵; what would not show, or would
    move its neighbours (controls, bidirectional marks, zero widths, lone surrogates, combining marks in front), is
    shown by its number.
    """
    shown = text[1:] if len(text) > 1 and text[0] == " " else text
    parts = []
    for place, character in enumerate(shown[:longest + 1]):
        kind = unicodedata.category(character)
        if character == "\n":
            parts.append("↵")
        elif character == " ":
            parts.append("␣" if shown.strip(" ") == "" else " ")
        elif kind[0] == "C" or kind in ("Zl", "Zp") or (kind[0] == "M" and place == 0):
            parts.append(f"\\u{ord(character):04x}")
        else:
            parts.append(character)
    whole = "".join(parts)
    return whole if len(whole) <= longest and len(shown) <= longest else whole[:longest - 1] + "…"


def joined(texts: list[str]) -> str:
    """The tokens' texts as one: bytes that are told one token after the other (<e5> <89 aa>) become their characters.

    Bytes that make no characters stay as they are told.
    """
    parts = []
    for is_part, group in itertools.groupby(texts, lambda text: _part(text) is not None):
        told = list(group)
        whole = _decoded(b"".join(map(_part, told))) if is_part else None
        parts.append("".join(told) if whole is None else whole)
    return "".join(parts)


def _part(text: str) -> bytes | None:
    """The bytes that `tracing.spell` tells of a token which is a part of a character; None for any other text."""
    found = _BYTES.fullmatch(text)
    raw = bytes.fromhex(found[1]) if found else None
    return raw if raw is not None and _decoded(raw) is None else None


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _title(circuit: Circuit) -> str:
    words = label(joined([token.text for token in circuit.runs[0].tokens]), 80)
    return f"{words} · the circuit of a run"


def _json(value: object) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return "".join(_ESCAPES.get(character, character) for character in text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
