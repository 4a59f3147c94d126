"""Trace files: safetensors with a JSON header in its metadata; docs/trace.md is the format.

Written tensor after tensor, whole or not at all. Read after `core.trace_header` has checked every size.
"""

import json
from pathlib import Path
from typing import BinaryIO

import torch

from sentei.circuit.run import Circuit, Run, Shape, Token
from sentei.core.errors import FileError, shown
from sentei.core.safetensors_header import read_header
from sentei.core.storage import write_whole
from sentei.core.trace_header import AGAIN, KEY, SCHEMA, check, need, parsed, refusing

DTYPES = {torch.uint8: "U8", torch.uint16: "U16", torch.int32: "I32", torch.float32: "F32"}


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
        with refusing(path), safe_open(path, framework="pt") as file:
            header = parsed((file.metadata() or {}).get(KEY, ""))
            check(header, tensors)
            circuit = _circuit(header)
            for name in tensors:
                number, _, rest = name.partition(".")
                circuit.runs[int(number)].tensors[rest] = file.get_tensor(name)
            for run in circuit.runs:
                for layer in range(len(run.layers)):
                    _check_connections(run, layer)
    except (SafetensorError, OSError) as error:
        raise FileError(str(path), expected="a whole trace file", got=shown(error), do=AGAIN) from error
    return circuit


def _circuit(header: dict) -> Circuit:
    plain = {key: header[key] for key in ("kind", "model", "rule", "versions", "date")}
    return Circuit(**plain, runs=tuple(map(_run, header["runs"])))


def _run(value: dict) -> Run:
    return Run(tokens=tuple(Token(id=number, text=text) for number, text in value["tokens"]), prompt=value["prompt"],
               causal=value["causal"], layers=tuple(Shape(**shape) for shape in value["layers"]), tensors={},
               following=tuple((text, chance) for text, chance in value["following"]),
               bypasses=tuple(value["bypasses"]))


def _check_connections(run: Run, layer: int) -> None:
    """Spans lie one behind the other within the tokens, and bits and rows are as many as they ask for."""
    parts = {part: run.get(layer, f"connections.{part}") for part in ("spans", "bits", "ids", "weights")}
    if all(part is None for part in parts.values()):
        return
    need(all(part is not None for part in parts.values()), f"all parts of connections in layer {layer}", "some")
    need(run.layers[layer].choosers > 0, f"connections where something chooses them, in layer {layer}", "no choosers")
    tokens, end, rows, size = len(run.tokens), 0, 0, 0
    for span in run.spans(layer):
        need(end <= span.first and 1 <= span.queries <= tokens - span.first and 1 <= span.block and 1 <= span.unit,
              f"spans within {tokens} tokens, in order, in layer {layer}", vars(span))
        end, rows = span.first + span.queries, rows + span.rows
        size += sum(-(-width // 8) for width in span.widths(tokens, run.causal))
    need(tuple(parts["bits"].shape[1:]) == (size,) and parts["ids"].shape[1] == parts["weights"].shape[1] == rows,
         f"{size} bytes and {rows} rows of connections in layer {layer}",
         [list(parts[part].shape) for part in ("bits", "ids", "weights")])
    most = -(-tokens // min((span.unit for span in run.spans(layer)), default=1))
    ids = parts["ids"].to(torch.int32)
    need(bool(((ids < most) | (ids == 65535)).all()), f"candidates below {most} in layer {layer}", int(ids.max()) if
          ids.numel() else 0)
