"""The header of a safetensors file, checked against the file before anything maps or allocates its tensors.

Layout: eight bytes of header length, a JSON object {name: {dtype, shape, data_offsets}}, then the bytes of the tensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from sentei.core.errors import FileError, shown
from sentei.core.storage import MAX_JSON_BYTES, parse_json, regular_size, unreadable

MAX_HEADER_BYTES = MAX_JSON_BYTES
MAX_TENSORS = 1 << 16
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """What a header says of one tensor: safetensors' name of the dtype, and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements, a Python integer that cannot overflow."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.elements * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in the order of their bytes; see `read_whole_header`."""
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and its metadata.

    Reads the header only; a file of 300 tensors costs well under a millisecond.

    Raises:
        FileError: not a regular file; the header is too long, malformed or holds a name twice; offsets overlap, leave
            gaps or leave the file; a shape does not match its bytes; the file goes on after the last tensor.
    """
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _malformed(path, f"a header of {length:,} bytes in a file of {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if raw.count(b'"data_offsets"') > MAX_TENSORS:  # counted before, because parsing them takes seconds
        raise _malformed(path, f"more than {MAX_TENSORS:,} tensors")
    try:
        entries = parse_json(raw)
        if b"\\u" in raw:  # half a surrogate pair is JSON and no text: safetensors' own reader fails at it
            json.dumps(entries, ensure_ascii=False).encode()
    except ValueError as error:
        raise _malformed(path, f"a header that is not one JSON object ({shown(error)})") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, "metadata that is not text")
    return _check_layout(path, entries, size - 8 - length), metadata


def _check_layout(path: Path, entries: dict, data_bytes: int) -> dict[str, Tensor]:
    spans = []
    if len(entries) > MAX_TENSORS:
        raise _malformed(path, f"{len(entries):,} tensors of at most {MAX_TENSORS:,}")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _malformed(path, f"no dtype, shape and offsets for the tensor {shown(name)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise _malformed(path, f"the dtype {shown(dtype)} of the tensor {shown(name)}")
        if not _sizes(shape) or not _sizes(offsets) or len(shape) > 16 or len(offsets) != 2:
            raise _malformed(path, f"the shape {shown(shape)} and offsets {shown(offsets)} of {shown(name)}")
        tensor = Tensor(dtype=dtype, shape=tuple(shape))
        if offsets[1] - offsets[0] != tensor.bytes:
            raise _malformed(path, f"{offsets[1] - offsets[0]:,} bytes for {shown(name)}, "
                                   f"whose shape {shown(shape)} needs {tensor.bytes:,}")
        spans.append((offsets[0], offsets[1], name, tensor))
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, name, _ in spans:
        if begin != position:
            raise _malformed(path, f"the tensor {shown(name)} at byte {begin:,} where {position:,} was next")
        position = end
    if position != data_bytes:
        raise _malformed(path, f"{data_bytes:,} bytes of tensors where the header describes {position:,}")
    return {name: tensor for _, _, name, tensor in spans}


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 1 << 63 for entry in value)


def _malformed(path: Path, got: str) -> FileError:
    return FileError(str(path), expected="a whole safetensors file", got=got, do="download the file again")
