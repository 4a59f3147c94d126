"""What a door is: how a harmless file is made, how sentei opens it, and what is done to the file before that."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Spoil = Callable[[Path], Path | None]


@dataclass(frozen=True, kw_only=True)
class Door:
    """One way for a file to come in.

    Args:
        name: of the door.
        make: writes something harmless into a new folder and returns what is opened.
        open: opens it, as the verbs of the command line do.
        attacks, twins: by name, what is done to the harmless file; a path that is returned is opened instead. An attack
            must be refused, a twin, which is the same kind of thing without harm, must not.
    """

    name: str
    make: Callable[[Path], Path]
    open: Callable[[Path], object]
    attacks: dict[str, Spoil]
    twins: dict[str, Spoil] = field(default_factory=dict)


def as_it_is(path: Path) -> None:
    """The twin that is not touched."""


def at(name: str, spoil: Spoil) -> Spoil:
    """What is done to a file of the folder; the folder is what is opened."""
    def spoil_member(path: Path) -> None:
        spoil(path / name)
    return spoil_member


def bytes_of(content: bytes) -> Spoil:
    """Puts other bytes in its place."""
    return lambda path: path.write_bytes(content) and None


def text_of(content: str) -> Spoil:
    """Puts another text in its place."""
    return bytes_of(content.encode())


def keys(**changes) -> Spoil:
    """Sets keys of a JSON file."""
    def spoil(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spoil


def edited(change: Callable[[dict], object]) -> Spoil:
    """Changes the object in a JSON file."""
    def spoil(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    return spoil


def cut(keep: float | int) -> Spoil:
    """Truncates a file to a number of bytes, from its end if negative, or to a share of them."""
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:int(len(content) * keep)] if isinstance(keep, float) else content[:keep])
    return spoil


def twice(key: str) -> Spoil:
    """Says the first key of a JSON object again at its end."""
    def spoil(path: Path) -> None:
        text = path.read_text().rstrip()
        path.write_text(f'{text[:-1]}, "{key}": {json.dumps(json.loads(text)[key])}}}')
    return spoil


def link(target: str | Path) -> Spoil:
    """Puts a link in its place, which leads elsewhere."""
    def spoil(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)
    return spoil


def moved_out(path: Path) -> None:
    """Moves a file out of its folder and leaves a link to it."""
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def sparse(size: int, start: bytes = b"") -> Spoil:
    """A file of `size` bytes that takes none on the disk: `start`, and then zeros."""
    def spoil(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(size)
    return spoil


def deep(depth: int, inside: bytes = b"[") -> bytes:
    """JSON that is nested and never ends."""
    return inside * depth


def header_of(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the bytes of its tensors."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def headed(change: Callable[[dict], object], length: int | None = None) -> Spoil:
    """Changes the header of a safetensors file, or what it says of its length; the tensors' bytes stay."""
    def spoil(path: Path) -> None:
        header, data = header_of(path)
        change(header)
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return spoil


def raw_header(raw: bytes, data: bytes = b"") -> Spoil:
    """A safetensors file with this header."""
    return bytes_of(struct.pack("<Q", len(raw)) + raw + data)
