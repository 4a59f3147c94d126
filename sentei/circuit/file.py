"""Trace files: safetensors with a JSON header in its metadata; docs/trace.md is the format.

Written tensor after tensor, whole or not at all. Read after every size has been checked against the header and the
file, so that a file that lies costs nothing; unknown keys and tensors are refused.
"""

import json
import re
from pathlib import Path
from typing import BinaryIO

import torch

from sentei.circuit.bits import STRONGEST
from sentei.circuit.run import (
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_NAME,
    MAX_TOKENS,
    OBSERVED,
    RAN,
    Circuit,
    Run,
    Shape,
    Token,
    expected_parts,
)
from sentei.core.errors import FileError, shown
from sentei.core.safetensors_header import Tensor, read_header
from sentei.core.storage import parse_json, write_whole

SCHEMA = "sentei.trace/1"
KEY = "sentei.trace"
DTYPES = {torch.uint8: "U8", torch.uint16: "U16", torch.int32: "I32", torch.float32: "F32"}
_NAME = re.compile(r"([012])\.(\d{1,3})\.([a-z]+(?:\.[a-z]+)?)")
_HEADER = {"schema", "kind", "model", "rule", "versions", "date", "runs"}
_RUN = {"tokens", "prompt", "causal", "layers", "following", "bypasses"}
_SHAPE = {"heads", "kv_heads", "choosers", "experts", "unit", "rank"}
MAX_PAIRS = 1 << 29  # bytes that one layer of a run takes when it is compared: 32 choosers of 4,096 tokens
MAX_TEXT = 1 << 16  # characters of a token
MAX_VERSIONS = 100


def header_of(circuit: Circuit) -> dict:
    """Everything but the tensors, as a JSON object."""
    return {"schema": SCHEMA, "kind": circuit.kind, "model": circuit.model, "rule": circuit.rule,
            "versions": circuit.versions, "date": circuit.date, "runs": [{
                "tokens": [[token.id, token.text] for token in run.tokens], "prompt": run.prompt, "causal": run.causal,
                "layers": [vars(shape) for shape in run.layers], "following": [list(item) for item in run.following],
                "bypasses": list(run.bypasses)} for run in circuit.runs]}


def tensors_of(circuit: Circuit) -> dict[str, torch.Tensor]:
    """All tensors by their names in the file."""
    return {f"{number}.{name}": tensor
            for number, run in enumerate(circuit.runs) for name, tensor in run.tensors.items()}


def save(circuit: Circuit, path: Path) -> None:
    """Writes a trace file, whole or not at all.

    Raises:
        ResourceError: the disk is full, or the place cannot be written.
    """
    write_whole(path, lambda temporary: _write_to(temporary, circuit))


def _write_to(path: Path, circuit: Circuit) -> None:
    with open(path, "wb") as file:
        _write(file, circuit)


def _write(file: BinaryIO, circuit: Circuit) -> None:
    """Layout: eight bytes of header length, the header, then the tensors' bytes, little-endian, one after the other."""
    entries: dict = {"__metadata__": {KEY: json.dumps(header_of(circuit), allow_nan=False)}}
    position, tensors = 0, tensors_of(circuit)
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for tensor in tensors.values():
        file.write(bytes_of(tensor))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, little-endian."""
    array = tensor.contiguous().cpu().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def is_trace(path: Path) -> bool:
    """Whether a file says that it is a trace; nothing else of it is believed."""
    if not path.is_file():  # to open a pipe is to wait
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(8 + 256)
    except OSError:
        return False
    return KEY.encode() in start and b"__metadata__" in start


def load(path: Path) -> Circuit:
    """The trace in a file that `save` wrote.

    Raises:
        FileError: not there, not whole, of another version, or with a size, key or tensor that does not fit.
    """
    from safetensors import SafetensorError, safe_open

    tensors = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(KEY, "")
            header = _header(raw)
            circuit = _circuit(header)
            _check_tensors(circuit, tensors)
            for name in tensors:
                number, _, rest = name.partition(".")
                circuit.runs[int(number)].tensors[rest] = file.get_tensor(name)
        for run in circuit.runs:
            for layer in range(len(run.layers)):
                _check_connections(run, layer)
    except _WrongError as wrong:
        raise FileError(str(path), expected=f"a trace of schema {SCHEMA}: {wrong.expected}", got=wrong.got,
                        do="write it again with sentei trace --save") from wrong
    except (SafetensorError, OSError) as error:
        raise FileError(str(path), expected="a whole trace file", got=shown(error),
                        do="write it again with sentei trace --save") from error
    return circuit


class _WrongError(Exception):
    """What a file was expected to say, and what it says."""

    def __init__(self, expected: str, got: object):
        super().__init__(expected)
        self.expected, self.got = expected, shown(got)


def _need(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise _WrongError(expected, got)


def _header(raw: str) -> dict:
    try:
        header = parse_json(raw.encode())
    except ValueError as error:
        raise _WrongError("a header that is one JSON object", error) from error
    _need(header.get("schema") == SCHEMA, f"the schema {SCHEMA}", header.get("schema"))
    _need(set(header) == _HEADER, f"the keys {', '.join(sorted(_HEADER))}", sorted(header))
    _need(header["kind"] in (RAN, OBSERVED), f"kind {RAN} or {OBSERVED}", header["kind"])
    for key in ("model", "rule", "date"):
        _need(_is_name(header[key]), f"text as {key}, of at most {MAX_NAME:,} characters", header[key])
    versions = header["versions"]
    _need(isinstance(versions, dict) and len(versions) <= MAX_VERSIONS and all(
        _is_name(name) and _is_name(version) for name, version in versions.items()),
        f"at most {MAX_VERSIONS} versions by name, of at most {MAX_NAME:,} characters", versions)
    runs = header["runs"]
    _need(isinstance(runs, list) and 1 <= len(runs) <= 3, "one to three runs", runs)
    return header


def _circuit(header: dict) -> Circuit:
    runs = tuple(map(_run, header["runs"]))
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    plain = {key: header[key] for key in ("kind", "model", "rule", "versions", "date")}
    return Circuit(**plain, runs=runs)


def _run(value: object) -> Run:
    _need(isinstance(value, dict) and set(value) == _RUN, f"runs with the keys {', '.join(sorted(_RUN))}", value)
    tokens, layers, following = value["tokens"], value["layers"], value["following"]
    _need(isinstance(tokens, list) and 1 <= len(tokens) <= MAX_TOKENS and all(
        isinstance(token, list) and len(token) == 2 and _is_size(token[0], 1 << 31) and _is_text(token[1])
        for token in tokens), f"1 to {MAX_TOKENS} tokens [number, text]", "others")
    _need(_is_size(value["prompt"], len(tokens)), "a prompt no longer than the tokens", value["prompt"])
    _need(isinstance(value["causal"], bool), "causal a bool", value["causal"])
    _need(isinstance(layers, list) and 1 <= len(layers) <= MAX_LAYERS and all(map(_is_shape, layers)),
          f"1 to {MAX_LAYERS} layers with {', '.join(sorted(_SHAPE))} in range", layers)
    _need(isinstance(following, list) and len(following) <= 100 and all(
        isinstance(item, list) and len(item) == 2 and _is_text(item[0]) and isinstance(item[1], float)
        and 0 <= item[1] <= 1 for item in following), "next tokens [text, probability]", following)
    bypasses = value["bypasses"]
    _need(isinstance(bypasses, list) and len(bypasses) <= MAX_LAYERS and all(map(_is_name, bypasses)),
          f"at most {MAX_LAYERS} bypasses as text, of at most {MAX_NAME:,} characters", bypasses)
    return Run(tokens=tuple(Token(id=number, text=text) for number, text in tokens), prompt=value["prompt"],
               causal=value["causal"], layers=tuple(Shape(**shape) for shape in layers), tensors={},
               following=tuple((text, chance) for text, chance in following), bypasses=tuple(bypasses))


def _check_comparable(first: Run, other: Run) -> None:
    """What two runs chose from can be compared, and in memory that a page is worth."""
    _need(len(first.layers) == len(other.layers), "as many layers in all runs", [len(first.layers), len(other.layers)])
    _need(first.causal == other.causal, "runs that are all causal, or none", [first.causal, other.causal])
    for layer, pair in enumerate(zip(first.layers, other.layers, strict=True)):
        few, many = sorted(max(shape.choosers, 1) for shape in pair)
        same = all(len({getattr(shape, name) for shape in pair} - {0}) <= 1 for name in _SHAPE - {"choosers"})
        _need(same and many % few == 0, f"runs of one model, with the same sizes in layer {layer}",
              list(map(vars, pair)))
    pairs = max(max(shape.choosers, 1) * len(run.tokens) ** 2 for run in (first, other) for shape in run.layers)
    _need(pairs <= MAX_PAIRS, f"at most {MAX_PAIRS:,} pairs of a chooser, a token and a key in a run that is compared",
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


def _check_tensors(circuit: Circuit, tensors: dict[str, Tensor]) -> None:
    """Every tensor has a known name and the dtype and shape that the header asks for; those of connections later."""
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        _need(found is not None, "tensors named RUN.LAYER.PART", name)
        number, layer, part = int(found[1]), int(found[2]), found[3]
        _need(number < len(circuit.runs) and layer < len(circuit.runs[number].layers)
              and name == f"{number}.{layer}.{part}", "tensors of runs and layers that are there", name)
        run = circuit.runs[number]
        shape, parts = run.layers[layer], expected_parts(run, layer)
        if part.startswith("connections."):
            lead = {"connections.spans": ("I32", (None, 4)), "connections.bits": ("U8", (shape.choosers, None)),
                    "connections.ids": ("U16", (shape.choosers, None, STRONGEST)),
                    "connections.weights": ("U8", (shape.choosers, None, STRONGEST))}.get(part)
            fits = lead is not None and tensor.dtype == lead[0] and len(tensor.shape) == len(lead[1]) and all(
                wanted in (None, size) for wanted, size in zip(lead[1], tensor.shape, strict=True))
        else:
            fits = part in parts and (tensor.dtype, tensor.shape) == (DTYPES[parts[part][0]], parts[part][1])
        _need(fits, f"a known part of the size the header says, for {name}", f"{tensor.dtype} {list(tensor.shape)}")


def _check_connections(run: Run, layer: int) -> None:
    """Spans lie one behind the other within the tokens, and bits and rows are as many as they ask for."""
    parts = {part: run.get(layer, f"connections.{part}") for part in ("spans", "bits", "ids", "weights")}
    if all(part is None for part in parts.values()):
        return
    _need(all(part is not None for part in parts.values()), f"all parts of connections in layer {layer}", "some")
    _need(run.layers[layer].choosers > 0, f"connections where something chooses them, in layer {layer}", "no choosers")
    tokens, end, rows, size = len(run.tokens), 0, 0, 0
    for span in run.spans(layer):
        _need(end <= span.first and 1 <= span.queries <= tokens - span.first and 1 <= span.block and 1 <= span.unit,
              f"spans within {tokens} tokens, in order, in layer {layer}", vars(span))
        end, rows = span.first + span.queries, rows + span.rows
        size += sum(-(-width // 8) for width in span.widths(tokens, run.causal))
    _need(tuple(parts["bits"].shape[1:]) == (size,) and parts["ids"].shape[1] == parts["weights"].shape[1] == rows,
          f"{size} bytes and {rows} rows of connections in layer {layer}",
          [list(parts[part].shape) for part in ("bits", "ids", "weights")])
    most = -(-tokens // min((span.unit for span in run.spans(layer)), default=1))
    ids = parts["ids"].to(torch.int32)
    _need(bool(((ids < most) | (ids == 65535)).all()), f"candidates below {most} in layer {layer}", int(ids.max()) if
          ids.numel() else 0)
