"""A file is whole or absent, whatever fails; and what is read is one well-formed JSON object."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from sentei.core import storage
from sentei.core.errors import FileError, ResourceError
from sentei.core.storage import read_json, require_writable, sha256, write_json, write_text, write_whole


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def old_file(folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text('{"old": true}')
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("value", [{}, {"a": [1, 2.5, None, True]}, {"word": "Baum ☃ 木"}, {"a": {"b": {}}}], ids=str)
def test_json_comes_back(tmp_path, value):
    write_json(tmp_path / "deep" / "folder" / "plan.json", value)
    assert read_json(tmp_path / "deep" / "folder" / "plan.json") == value
    assert names(tmp_path / "deep" / "folder") == ["plan.json"]


def test_a_written_file_is_readable_by_others(tmp_path):
    write_text(tmp_path / "a.txt", "x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_numbers_json_cannot_hold_are_not_written(tmp_path, number):
    path = old_file(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": number})
    assert path.read_text() == '{"old": true}' and names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("target, name", [
    (os, "replace"), (os, "fsync"), (Path, "write_text"), (Path, "chmod"), (storage.tempfile, "mkstemp"),
], ids=["replace", "fsync", "write_text", "chmod", "mkstemp"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, target, name):
    path = old_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full_disk)
        with pytest.raises(ResourceError, match="got a full disk; free some space and run the same command") as info:
            write_json(path, {"new": True})
    assert info.value.where == str(path) and isinstance(info.value.__cause__, OSError)
    assert path.read_text() == '{"old": true}' and names(tmp_path) == ["plan.json"]


def test_a_disk_that_fills_half_way_leaves_no_half_file(tmp_path):
    def half(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        full_disk()

    with pytest.raises(ResourceError):
        write_whole(tmp_path / "weights", half)
    assert names(tmp_path) == []


def test_a_quota_counts_as_a_full_disk(tmp_path):
    def over_quota(temporary: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(ResourceError, match="full disk"):
        write_whole(tmp_path / "weights", over_quota)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")], ids=lambda error: type(error).__name__)
def test_whatever_else_stops_the_writing_passes_through_and_leaves_nothing(tmp_path, error):
    path = old_file(tmp_path)

    def stopped(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, stopped)
    assert path.read_text() == '{"old": true}' and names(tmp_path) == ["plan.json"]


def test_a_folder_in_the_way_is_said_to_be_unwritable(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ResourceError, match="make it writable and run the same command again"):
        write_json(tmp_path / "plan.json", {})
    assert names(tmp_path) == ["plan.json"]


def test_a_file_where_the_folder_should_be_is_said_to_be_unwritable(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ResourceError, match="expected a path that can be written"):
        write_json(tmp_path / "out" / "plan.json", {})


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        require_writable(folder, folder / "not there yet")
        assert folder.is_dir() and names(folder) == []


@pytest.mark.parametrize("where", ["old", "old/below", "/dev/null/below", "/proc/below"])
def test_a_folder_that_cannot_be_written_is_found_out(tmp_path, where):
    (tmp_path / "old").write_text("a file")
    with pytest.raises(ResourceError, match="choose another folder with --out"):
        require_writable(tmp_path / where)
    assert names(tmp_path) == ["old"]


def test_a_full_disk_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", full_disk)
    with pytest.raises(ResourceError, match="a full disk; free some space"):
        require_writable(tmp_path)


def test_a_folder_where_a_file_is_to_be_is_found_out(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ResourceError, match="directory") as error:
        require_writable(tmp_path, tmp_path / "other", tmp_path / "plan.json")
    assert error.value.where == str(tmp_path / "plan.json")


def test_the_data_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_text(tmp_path / "a.txt", "x")
    assert order == ["sync", "rename", "sync"]


BAD = {
    "empty": (b"", "expected one well-formed JSON object"),
    "cut off": (b'{"a": 1', "expected one well-formed JSON object"),
    "duplicate": (b'{"a": 1, "a": 2}', "a key that appears twice"),
    "duplicate inside": (b'{"a": [{"b": 1, "b": 1}]}', "a key that appears twice"),
    "deep lists": (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "expected one well-formed JSON object"),
    "deep objects": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "expected one well-formed JSON object"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "codec can't decode"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", "expected one well-formed JSON object"),
    "a list": (b"[1]", "expected one well-formed JSON object, got a list"),
    "a word": (b'"word"', "expected one well-formed JSON object, got a str"),
    "two objects": (b"{}{}", "expected one well-formed JSON object"),
    "a null byte": (b"\x00", "expected one well-formed JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_one_object_is_refused(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as info:
        read_json(path)
    assert info.value.where == str(path)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    size = path.stat().st_size
    assert read_json(path, max_bytes=size)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("the file was read"))
    with pytest.raises(FileError, match=f"at most {size - 1:,} bytes of JSON, got {size:,} bytes"):
        read_json(path, max_bytes=size - 1)


@pytest.mark.parametrize("part", ["[]", "{}", '{"":0}', "0"])
def test_a_bomb_of_small_values_is_not_parsed(tmp_path, monkeypatch, part):
    monkeypatch.setattr(storage, "MAX_JSON_PARTS", 1000)
    path = tmp_path / "config.json"
    path.write_text('{"a":[' + ",".join([part] * 200) + "]}")
    read_json(path)
    path.write_text('{"a":[' + ",".join([part] * 1000) + "]}")
    monkeypatch.setattr(storage.json, "loads", lambda *_, **__: pytest.fail("the file was parsed"))
    with pytest.raises(FileError, match="at most 1,000 values"):
        read_json(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "sentei.json")
    with pytest.raises(FileError, match="not a file"):
        read_json(tmp_path / "sentei.json")


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read_is_said_so(tmp_path, name):
    with pytest.raises(FileError, match="expected a file that can be read"):
        read_json(tmp_path / name)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"bonsai" * 10**5)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"bonsai" * 10**5).hexdigest()


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    """Ours, and what safetensors was writing to."""
    (tmp_path / "deep").mkdir()
    left = [tmp_path / ".a.json.x1_y.part", tmp_path / "deep" / ".tmp6f8yCs", tmp_path / ".tmpAbCdEf"]
    kept = [tmp_path / "a.json", tmp_path / ".tmp", tmp_path / ".tmp-of-mine", tmp_path / "tmp6f8yCs"]
    for path in left + kept:
        path.write_text("x")
    storage.sweep(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
