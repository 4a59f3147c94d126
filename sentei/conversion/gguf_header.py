"""The header of a GGUF file, read with bounds before any other reader sees the file.

Sizes are compared as Python integers, which cannot overflow: an overflowing product is how GGUF readers were attacked.
Layout: magic, version, counts, typed key-value pairs, tensor descriptions, padding, then the bytes of the tensors.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sentei.core.errors import FileError, UnsupportedError, shown
from sentei.core.storage import regular_size, unreadable

MAX_TENSORS = 1 << 16
MAX_PAIRS = 100_000
MAX_NAME_BYTES = 1 << 16
MAX_TEXT_BYTES = 1 << 24  # of all names and texts together that are kept
MAX_ARRAY = 1 << 24
MAX_TEXTS = 1 << 20  # in all arrays together: a vocabulary and its merges, which are read one by one
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Type number: name, elements of a block, bytes of a block.
QUANTISATIONS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies.

    Args:
        kind: the number of its type, a key of `QUANTISATIONS`.
        shape: rows first, as in torch (the file has it the other way round).
        begin: its first byte, counted from the start of the file.
        end: the byte after its last.
    """

    kind: int
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of weights, a Python integer that cannot overflow."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What sentei needs to know of a GGUF file.

    Args:
        values: the scalar and text pairs; arrays are skipped.
        tensors: by the file's own names.
        quantisation: the type of most weights, e.g. "Q4_1".
    """

    values: dict[str, int | float | bool | str]
    tensors: dict[str, GgufTensor]
    quantisation: str

    @property
    def elements(self) -> int:
        """Number of weights in the file."""
        return sum(tensor.elements for tensor in self.tensors.values())


class _Reader:
    """Reads forward and never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.left, self.size = path, file, size, size
        self.text_bytes, self.texts = MAX_TEXT_BYTES, MAX_TEXTS

    def take(self, count: int) -> bytes:
        self.skip(count, seek=False)
        return self.file.read(count)

    def skip(self, count: int, *, seek: bool = True) -> None:
        if count > self.left:
            raise _malformed(self.path, f"{count:,} more bytes announced where {self.left:,} are left")
        self.left -= count
        if seek:
            self.file.seek(count, 1)

    def scalar(self, code: str) -> int | float | bool:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, longest: int) -> str:
        length = self.scalar("Q")
        self.text_bytes -= length
        if length > longest or self.text_bytes < 0:
            raise _malformed(self.path, f"a text of {length:,} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def skip_texts(self, count: int) -> None:
        """Passes over an array of texts; a plain loop, as a vocabulary has a million of them."""
        self.texts -= count
        if self.texts < 0:
            raise _malformed(self.path, f"more than {MAX_TEXTS:,} texts in arrays")
        left, read, seek = self.left, self.file.read, self.file.seek
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            left -= 8 + length
            if left < 0:
                raise _malformed(self.path, f"a text of {length:,} bytes beyond the file")
            seek(length, 1)
        self.left = left

    def value(self) -> int | float | bool | str | None:
        """One typed value; None for an array, which is checked and passed over."""
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text(MAX_TEXT_BYTES)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise _malformed(self.path, f"a value of type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > MAX_ARRAY:
            raise _malformed(self.path, f"an array of {count:,} values")
        if kind == _STRING:
            self.skip_texts(count)
        elif kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        else:
            raise _malformed(self.path, f"an array of type {kind}")
        return None


def read_header(path: Path) -> GgufHeader:
    """Checks a GGUF file's header against the file and returns what it says.

    Costs about 0.1 s for a vocabulary of 50,000 and reads no tensor.

    Raises:
        FileError: not GGUF, a version other than 2 or 3, or any count, size or offset that does not fit the file.
        UnsupportedError: tensors of a type sentei does not know, or one model split over several files.
    """
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            return _read(_Reader(path, file, size))
    except OSError as error:
        raise unreadable(path, error) from error


def _read(reader: _Reader) -> GgufHeader:
    path = reader.path
    magic = reader.take(4)
    if magic != b"GGUF":
        raise _malformed(path, f"a file that begins with {shown(magic)}")
    version, tensors, pairs = reader.scalar("I"), reader.scalar("Q"), reader.scalar("Q")
    if version not in (2, 3) or tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        raise _malformed(path, f"version {version} with {tensors:,} tensors and {pairs:,} values")
    values: dict = {}
    for _ in range(pairs):
        key = reader.text(MAX_NAME_BYTES)
        if key in values:
            raise _malformed(path, f"the key {shown(key)} twice")
        values[key] = reader.value()
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _malformed(path, f"an alignment of {shown(alignment)}")
    if values.get("split.count") not in (None, 0, 1):
        raise UnsupportedError(str(path), expected="a model in one file", got=f"part of {values['split.count']} files",
                               do="join the parts with `llama-gguf-split --merge`")
    return _read_tensors(reader, tensors, values, alignment)


def _read_tensors(reader: _Reader, count: int, values: dict, alignment: int) -> GgufHeader:
    path, described = reader.path, {}
    for _ in range(count):
        name, dimensions = reader.text(MAX_NAME_BYTES), reader.scalar("I")
        if name in described or not 1 <= dimensions <= 4:
            raise _malformed(path, f"the tensor {shown(name)} twice or in {dimensions} dimensions")
        shape = tuple(reversed([reader.scalar("Q") for _ in range(dimensions)]))
        described[name] = shape, reader.scalar("I"), reader.scalar("Q")
    data = -(-(reader.size - reader.left) // alignment) * alignment
    tensors = {name: _tensor(path, name, *entry, data=data, alignment=alignment) for name, entry in described.items()}
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < end or tensor.end > reader.size:
            raise _malformed(path, f"the tensor {shown(name)} at bytes {tensor.begin:,} to {tensor.end:,} "
                                   f"of {reader.size:,}, where {end:,} was next")
        end = tensor.end
    kinds = Counter()
    for tensor in tensors.values():
        kinds[QUANTISATIONS[tensor.kind][0]] += tensor.elements
    if not kinds:
        raise _malformed(path, "no tensors")
    return GgufHeader(values={key: value for key, value in values.items() if value is not None}, tensors=tensors,
                      quantisation=kinds.most_common(1)[0][0])


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, *, data: int,
            alignment: int) -> GgufTensor:
    if kind not in QUANTISATIONS:
        raise UnsupportedError(str(path), expected="weights in a known GGUF type", got=f"type {kind} for {shown(name)}",
                               do="use another quantisation of this model, e.g. Q8_0")
    _, block, block_bytes = QUANTISATIONS[kind]
    if shape[-1] % block or offset % alignment:
        raise _malformed(path, f"the tensor {shown(name)} of shape {shown(shape)} at byte {offset:,}")
    begin = data + offset
    return GgufTensor(kind=kind, shape=shape, begin=begin, end=begin + math.prod(shape) // block * block_bytes)


def _malformed(path: Path, got: str) -> FileError:
    return FileError(str(path), expected="a whole GGUF file", got=got, do="download the file again")
