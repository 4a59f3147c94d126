"""Files that are either whole or absent: read with a size limit, written beside and renamed."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sentei.core.errors import FileError, ResourceError, SenteiError

# One character beyond the sixteenth plane makes Python keep four bytes for each of the file, and again for its values.
MAX_JSON_BYTES = 16 << 20
# Sixteen megabytes of "[]," would parse to 350 of empty lists. What these characters stand for takes at most about 64,
# 90 and 250 bytes of Python objects; a vocabulary of 260,000 tokens has two million parts and half a million lists.
MAX_JSON_PARTS, MAX_JSON_LISTS, MAX_JSON_OBJECTS = 4_000_000, 1_000_000, 200_000
# The end of the name of a file that is still being written; its name begins with a dot.
UNFINISHED = ".part"
SAFETENSORS_UNFINISHED = ".tmp??????"  # what safetensors itself writes to, beside the file it was given
LOCK = ".lock"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)` beside `path`, syncs the result and renames it into place.

    A crash at any moment leaves either the old file or the new one, never a part.

    Raises:
        ResourceError: the disk is full or the folder cannot be written; `path` is then as it was before (or whole
            and new, where nothing but the folder's own sync failed).
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(folder: Path, *files: Path) -> None:
    """Makes a folder, and a file in it that is gone at once, before the work whose result is to lie there.

    Args:
        files: that will be written; none of them may be a folder.
    Raises:
        ResourceError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(folder, error, "choose another folder with --out") from error
    for path in files:
        if path.is_dir():
            raise cannot_write(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)),
                               "remove it, or choose another folder with --out")


def sync_folder(folder: Path) -> None:
    """Makes the names inside `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Removes what a process that was killed left unfinished below `folder`, where nobody else may be writing."""
    for pattern in (f".*{UNFINISHED}", SAFETENSORS_UNFINISHED):
        for left in folder.rglob(pattern):
            left.unlink()


def disk_is_full(error: BaseException) -> bool:
    """Whether `error` means a full disk or quota; safetensors and tokenizers say so in words alone."""
    return any(getattr(error, "errno", None) == code or os.strerror(code) in str(error)
               for code in (errno.ENOSPC, errno.EDQUOT))


def cannot_write(path: Path, error: Exception, do: str = "make it writable and run the same command again"
                 ) -> ResourceError:
    """The error to raise when writing `path` failed with `error`; `do` is the advice unless the disk is full."""
    full = disk_is_full(error)
    return ResourceError(
        str(path),
        expected="a path that can be written",
        got="a full disk" if full else f"{getattr(error, 'strerror', None) or error}",
        do="free some space and run the same command again" if full else do,
    )


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """Reads one JSON object, refusing files that are too large, malformed or hold duplicate keys, NaN or infinity.

    Raises:
        FileError: see `json_bytes`; or not UTF-8, not JSON, or not an object.
    """
    raw = json_bytes(path, max_bytes)
    try:
        return parse_json(raw)
    except ValueError as error:
        raise FileError(str(path), expected="one well-formed JSON object", got=str(error),
                        do="download or write the file again") from error


def json_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a JSON file that is small enough to parse.

    Raises:
        FileError: the file is missing, not a regular file, larger than `max_bytes`, or holds too many values.
    """
    size = regular_size(path)
    if size > max_bytes:
        raise FileError(str(path), expected=f"at most {max_bytes:,} bytes of JSON", got=f"{size:,} bytes",
                        do="check that this is the file you meant")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if _too_many_parts(raw):
        raise FileError(str(path), expected=f"at most {MAX_JSON_PARTS:,} values", got="more",
                        do="check that this is the file you meant")
    return raw


def regular_size(path: Path) -> int:
    """The bytes of a regular file; a pipe would make its reader wait for ever.

    Raises:
        FileError: it is missing, or something else.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise FileError(str(path), expected="a file that can be read", got="something that is not a file",
                        do="check the path")
    return found.st_size


def unreadable(path: Path, error: OSError) -> FileError:
    """The error to raise when reading `path` failed with `error`."""
    return FileError(str(path), expected="a file that can be read", got=str(error.strerror or error),
                     do="check the path and its permissions")


def parse_json(raw: bytes) -> dict:
    """The one JSON object in `raw`.

    Raises:
        ValueError: too many values, not UTF-8, not JSON, nested too deep, a key that appears twice, NaN, infinity, or
            not an object.
    """
    if _too_many_parts(raw):
        raise ValueError(f"more than {MAX_JSON_PARTS:,} values")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def _too_many_parts(raw: bytes) -> bool:
    """Whether the commas, colons and brackets, which bound the number of objects, are too many."""
    lists, objects = raw.count(b"["), raw.count(b"{")
    return (lists > MAX_JSON_LISTS or objects > MAX_JSON_OBJECTS
            or lists + objects + raw.count(b",") + raw.count(b":") > MAX_JSON_PARTS)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key that appears twice")
    return value


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def claimed(out: Path, marker: str, command: str) -> Iterator[None]:
    """Makes `out` ours for the length of a block: a new or empty folder, or one an earlier run made.

    Args:
        marker: the name of the file that says so.
        command: that makes such folders, for the message.
    Raises:
        SenteiError: a file, or a folder with other things in it.
        FileError: a folder with links in it, through which a run would write elsewhere.
        ResourceError: it cannot be written, or another process is working in it.
    """
    try:
        if out.exists() and not _ours(out, marker):
            raise SenteiError("--out", expected=f"a new or empty folder, or one that {command} made",
                              got=f"{out}, which holds something else", do="name another folder")
        linked = next((path for path in out.rglob("*") if path.is_symlink()), None)
        if linked is not None:
            raise FileError(str(linked), expected="files and folders of a run", got="a link",
                            do="remove it, or name another folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "a")
    except OSError as error:
        raise cannot_write(out, error, "choose another folder with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(str(out), expected="a folder no other process works in", got="one that is locked",
                                do="wait for the other run, or name another folder with --out") from error
        sweep(out)
        write_json(out / marker, {"schema": "sentei.run/1"})
        yield


def _ours(out: Path, marker: str) -> bool:
    """Whether `out` is a folder with our marker, or with nothing but what a run killed before it leaves."""
    return out.is_dir() and ((out / marker).is_file() or all(
        path.name == LOCK or path.name.startswith(f".{marker}.") for path in out.iterdir()))


class Stages:
    """The results of finished stages, so that a run that was cut off goes on where it stopped.

    Args:
        folder: one JSON file a stage; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def run(self, name: str, inputs: dict, work: Callable[[], dict]) -> dict:
        """The result of `work()`, or of an earlier run of the stage with the same inputs.

        Args:
            name: of the stage; the name of its file.
            inputs: everything the result depends on, JSON-able; a result of other inputs is replaced.
            work: returns a JSON object.
        """
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode()).hexdigest()
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is not None and path.exists():
            stored = read_json(path)
            if stored.get("key") == key and isinstance(stored.get("result"), dict):
                return stored["result"]
        result = work()
        if path is not None:
            write_json(path, {"key": key, "result": result})
        return result
