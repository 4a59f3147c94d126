"""What is measured once for a machine: remembered beyond the process, and measured again where the file is not ours."""

import json
import math
import os
import subprocess
import sys

import pytest

from sentei.core import machine
from sentei.kernels import gains, native

CASE = ("attention", "float32", (9, 3), True, 2048, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for each test, and a process that knows nothing."""
    monkeypatch.setattr(gains, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(gains, "_known", {})
    return tmp_path / "cache" / "choices"


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the ways move: the first takes three seconds, the second two; it counts the measurements."""
    now, asked = [0.0], []

    def taking(seconds):
        def way():
            now[0] += seconds
        return way

    def ways():
        asked.append(1)
        return taking(3.0), taking(2.0)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    ways.asked = asked
    return ways


def test_a_case_is_measured_once_for_a_process_and_once_for_a_machine(clock, folder):
    assert gains.gain(CASE, clock) == gains.gain(CASE, clock) == (1.5, "measured here")
    gains.forget()
    assert gains.gain(CASE, clock) == (1.5, "measured here before")
    assert len(clock.asked) == 1
    assert gains.gain((*CASE, "another"), clock) == (1.5, "measured here")
    assert len(clock.asked) == 2 and len(list(folder.iterdir())) == 1
    gains.forget()
    assert gains.gain(CASE, clock)[1] == "measured here before", "a second case leaves the first"


def test_a_file_is_of_one_library_one_torch_and_one_processor(clock, folder, monkeypatch):
    gains.gain(CASE, clock)
    right = gains._machine()
    assert right.keys() == {"kernel", "torch", "processor"} and right["kernel"] == native.identity()
    for number, name in enumerate(right):
        gains.forget()
        monkeypatch.setattr(gains, "_machine", lambda name=name: right | {name: "another"})
        assert gains.gain(CASE, clock) == (1.5, "measured here")
        assert len(list(folder.iterdir())) == 2 + number


def with_gains(found) -> bytes:
    return json.dumps({"schema": gains.SCHEMA, "machine": gains._machine(), "gains": found}).encode()


HOSTILE = {
    "empty": b"", "no JSON": b"{", "a list": b"[]", "not UTF-8": b"\xff\xfe{}", "deep": b"[" * 100_000,
    "a key twice": b'{"schema": 1, "schema": 1}', "nothing in it": b"{}",
    "too large": with_gains({", ".join(map(str, CASE)): 9.0}) + b" " * gains.MAX_BYTES,
    "no gains": with_gains(None), "a list of gains": with_gains([1.0]), "words": with_gains({"a": "1.5"}),
    "a truth": with_gains({"a": True}), "a whole number": with_gains({"a": 10**400}), "none": with_gains({"a": None}),
    "not a number": with_gains({"a": math.nan}), "infinite": with_gains({"a": math.inf}), "0": with_gains({"a": 0.0}),
    "huge": with_gains({"a": 1e300}), "too many": with_gains({str(n): 1.0 for n in range(gains.MAX_CASES)}),
    "of another machine": with_gains({"a": 1.0}).replace(b'"torch": "', b'"torch": "0'),
    "of another schema": with_gains({"a": 1.0}).replace(b"choices/1", b"choices/2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_ours_is_measured_again_said_and_replaced(name, clock, folder):
    folder.mkdir(parents=True)
    gains._path().write_bytes(HOSTILE[name])
    found, origin = gains.gain(CASE, clock)
    assert found == 1.5 and origin.startswith("measured here again: the file of earlier measurements had ")
    gains.forget()
    assert gains.gain(CASE, clock) == (1.5, "measured here before")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(path)],
                         ids=["a folder", "a pipe", "a loop"])
def test_what_is_no_file_is_measured_again_and_never_waited_for(make, clock, folder):
    folder.mkdir(parents=True)
    make(gains._path())
    found, origin = gains.gain(CASE, clock)
    assert found == 1.5 and origin.startswith("measured here")
    assert "again: " in origin or "for this process alone: " in origin


def test_where_nothing_can_be_written_it_is_for_this_process_alone_and_says_so(clock, folder, monkeypatch):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the folder should be")
    found, origin = gains.gain(CASE, clock)
    assert found == 1.5 and "for this process alone" in origin and "cannot be written" in origin
    assert gains.gain(CASE, clock) == (found, origin) and len(clock.asked) == 1

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    gains.forget()
    monkeypatch.setattr(gains, "cache_folder", homeless)
    assert gains.gain(CASE, clock) == (
        1.5, "measured here, for this process alone: Could not determine home directory.")


def test_the_folder_is_the_one_other_caches_use_and_another_process_reads_it(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(gains, "cache_folder", machine.cache_folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    gains.gain(CASE, clock)
    assert gains._path().is_relative_to(tmp_path / ".cache" / "sentei" / "choices") and gains._path().exists()
    code = f"from sentei.kernels import gains\nprint(gains.gain({CASE!r}, None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1.5, 'measured here before')\n"


def in_turn(monkeypatch, first: float, second) -> tuple[float, int]:
    """The ratio, and how often each was called: the first takes its seconds, call n of the second takes second(n)."""
    now, calls = [0.0], []

    def take_first():
        now[0] += first

    def take_second():
        calls.append(1)
        now[0] += second(len(calls))

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return gains.in_turn(take_first, take_second), len(calls)


def test_the_median_of_pairs_is_not_moved_by_one_slow_run(monkeypatch):
    ratio, calls = in_turn(monkeypatch, 3.0, lambda call: 100.0 if call == 3 else 2.0)
    assert ratio == 1.5 and calls == gains.RUNS + 1


def test_the_first_calls_of_short_ones_do_not_decide(monkeypatch):
    """Five pairs in which the second seems slow, then those in which it is not."""
    ratio, calls = in_turn(monkeypatch, 0.003, lambda call: 0.006 if call < 6 else 0.002)
    assert ratio == pytest.approx(1.5) and calls < 30
