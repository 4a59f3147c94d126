"""What a trace file says of itself, checked without torch: its JSON header, and the table of its tensors against it.

docs/trace.md is the format. Every size is compared with the header and the file before anything is read, so that a file
that lies costs nothing; unknown keys and tensors are refused. What it passes on is as JSON gives it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sentei.core.errors import FileError, shown
from sentei.core.safetensors_header import Tensor
from sentei.core.storage import parse_json

SCHEMA = "sentei.trace/1"
KEY = "sentei.trace"  # of the header in the metadata of safetensors
RAN, OBSERVED = "ran", "observed"
MAX_TOKENS, MAX_LAYERS, MAX_HEADS, MAX_EXPERTS = 65_534, 1000, 4096, 65_534
MAX_NAME = 1024  # characters of a model's name, a rule, a date, a version or a reason
MAX_TEXT = 1 << 16  # characters of a token
MAX_VERSIONS = 100
MAX_PAIRS = 1 << 29  # bytes that one layer of a run takes when it is compared: 32 choosers of 4,096 tokens
STRONGEST = 8  # how many weights a row of connections keeps
EXPERT_WEIGHTS = 16  # how many experts' weights a token keeps
AGAIN = "write it again with sentei trace --save"
_NAME = re.compile(r"([012])\.(\d{1,3})\.([a-z]+(?:\.[a-z]+)?)")
_HEADER = {"schema", "kind", "model", "rule", "versions", "date", "runs"}
_RUN = {"tokens", "prompt", "causal", "layers", "following", "bypasses"}
_SHAPE = {"heads", "kv_heads", "choosers", "experts", "unit", "rank"}


class _WrongError(Exception):
    """What a file was expected to say, and what it says."""

    def __init__(self, expected: str, got: object):
        super().__init__(expected)
        self.expected, self.got = expected, shown(got)


def need(holds: bool, expected: str, got: object) -> None:
    """Refuses the trace that `refusing` stands around unless `holds`."""
    if not holds:
        raise _WrongError(expected, got)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Makes of what a block finds wrong with a trace the error of its file.

    Raises:
        FileError: something that the block needs does not hold.
    """
    try:
        yield
    except _WrongError as wrong:
        raise FileError(str(path), expected=f"a trace of schema {SCHEMA}: {wrong.expected}", got=wrong.got,
                        do=AGAIN) from wrong


def parsed(raw: str) -> dict:
    """The header as an object of which nothing is believed yet; within `refusing`."""
    try:
        return parse_json(raw.encode())
    except ValueError as error:
        raise _WrongError("a header that is one JSON object", error) from error


def check(header: dict, tensors: dict[str, Tensor]) -> None:
    """Refuses a header of another form, runs that cannot be compared, and tensors that do not fit; within `refusing`.

    The values of connections are not seen here, nor how many rows and bytes they need.
    """
    _check_header(header)
    for run in header["runs"]:
        _check_run(run)
    for run in header["runs"][1:]:
        _check_comparable(header["runs"][0], run)
    _check_tensors(header["runs"], tensors)


def _check_header(header: dict) -> None:
    need(header.get("schema") == SCHEMA, f"the schema {SCHEMA}", header.get("schema"))
    need(set(header) == _HEADER, f"the keys {', '.join(sorted(_HEADER))}", sorted(header))
    need(header["kind"] in (RAN, OBSERVED), f"kind {RAN} or {OBSERVED}", header["kind"])
    for key in ("model", "rule", "date"):
        need(_is_name(header[key]), f"text as {key}, of at most {MAX_NAME:,} characters", header[key])
    versions = header["versions"]
    need(isinstance(versions, dict) and len(versions) <= MAX_VERSIONS and all(
        _is_name(name) and _is_name(version) for name, version in versions.items()),
        f"at most {MAX_VERSIONS} versions by name, of at most {MAX_NAME:,} characters", versions)
    runs = header["runs"]
    need(isinstance(runs, list) and 1 <= len(runs) <= 3, "one to three runs", runs)


def _check_run(run: object) -> None:
    need(isinstance(run, dict) and set(run) == _RUN, f"runs with the keys {', '.join(sorted(_RUN))}", run)
    tokens, layers, following = run["tokens"], run["layers"], run["following"]
    need(isinstance(tokens, list) and 1 <= len(tokens) <= MAX_TOKENS and all(
        isinstance(token, list) and len(token) == 2 and _is_size(token[0], 1 << 31) and _is_text(token[1])
        for token in tokens), f"1 to {MAX_TOKENS} tokens [number, text]", "others")
    need(_is_size(run["prompt"], len(tokens)), "a prompt no longer than the tokens", run["prompt"])
    need(isinstance(run["causal"], bool), "causal a bool", run["causal"])
    need(isinstance(layers, list) and 1 <= len(layers) <= MAX_LAYERS and all(map(_is_shape, layers)),
         f"1 to {MAX_LAYERS} layers with {', '.join(sorted(_SHAPE))} in range", layers)
    need(isinstance(following, list) and len(following) <= 100 and all(
        isinstance(item, list) and len(item) == 2 and _is_text(item[0]) and isinstance(item[1], float)
        and 0 <= item[1] <= 1 for item in following), "next tokens [text, probability]", following)
    bypasses = run["bypasses"]
    need(isinstance(bypasses, list) and len(bypasses) <= MAX_LAYERS and all(map(_is_name, bypasses)),
         f"at most {MAX_LAYERS} bypasses as text, of at most {MAX_NAME:,} characters", bypasses)


def _check_comparable(first: dict, other: dict) -> None:
    """What two runs chose from can be compared, and in memory that a page is worth."""
    need(len(first["layers"]) == len(other["layers"]), "as many layers in all runs",
         [len(first["layers"]), len(other["layers"])])
    need(first["causal"] == other["causal"], "runs that are all causal, or none", [first["causal"], other["causal"]])
    for layer, pair in enumerate(zip(first["layers"], other["layers"], strict=True)):
        few, many = sorted(max(shape["choosers"], 1) for shape in pair)
        same = all(len({shape[name] for shape in pair} - {0}) <= 1 for name in _SHAPE - {"choosers"})
        need(same and many % few == 0, f"runs of one model, with the same sizes in layer {layer}", list(pair))
    pairs = max(max(shape["choosers"], 1) * len(run["tokens"]) ** 2 for run in (first, other)
                for shape in run["layers"])
    need(pairs <= MAX_PAIRS, f"at most {MAX_PAIRS:,} pairs of a chooser, a token and a key in a run that is compared",
         pairs)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_name(value: object) -> bool:
    return _is_text(value) and len(value) <= MAX_NAME


def _is_size(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_shape(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != _SHAPE:
        return False
    most = {"heads": MAX_HEADS, "kv_heads": MAX_HEADS, "choosers": MAX_HEADS, "experts": MAX_EXPERTS,
            "unit": 1 << 31, "rank": 65_535}
    if not all(_is_size(value[key], largest) for key, largest in most.items()):
        return False
    heads, groups, choosers = value["heads"], value["kv_heads"], value["choosers"]
    return heads >= 1 and groups >= 1 and heads % groups == 0 and (choosers == 0 or heads % choosers == 0)


def _check_tensors(runs: list[dict], tensors: dict[str, Tensor]) -> None:
    """Every tensor has a known name and the dtype and shape that the header asks for."""
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        need(found is not None, "tensors named RUN.LAYER.PART", name)
        number, layer, part = int(found[1]), int(found[2]), found[3]
        need(number < len(runs) and layer < len(runs[number]["layers"]) and name == f"{number}.{layer}.{part}",
             "tensors of runs and layers that are there", name)
        dtype, shape = _parts(runs[number], layer).get(part, (None, ()))
        fits = tensor.dtype == dtype and len(tensor.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True))
        need(fits, f"a known part of the size the header says, for {name}", f"{tensor.dtype} {list(tensor.shape)}")


def _parts(run: dict, layer: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """The dtype and shape of every part that a layer may have; None where only the part itself can say a size."""
    tokens, shape = len(run["tokens"]), run["layers"][layer]
    groups, choosers, experts = shape["kv_heads"], shape["choosers"], shape["experts"]
    parts = {"cost": ("F32", (tokens, 2)), "depth.bits": ("U8", (tokens,)), "depth.weights": ("U8", (tokens, 2)),
             "heads.weights": ("U8", (tokens, groups)), "heads.bits": ("U8", (tokens, -(-groups // 8))),
             "rank.kept": ("U16", (tokens,)), "connections.spans": ("I32", (None, 4)),
             "connections.bits": ("U8", (choosers, None)), "connections.ids": ("U16", (choosers, None, STRONGEST)),
             "connections.weights": ("U8", (choosers, None, STRONGEST))}
    if experts:
        kept = min(experts, EXPERT_WEIGHTS)
        parts |= {"experts.bits": ("U8", (tokens, -(-experts // 8))), "experts.ids": ("U16", (tokens, kept)),
                  "experts.weights": ("U8", (tokens, kept))}
    return parts
