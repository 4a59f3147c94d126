"""Text is read with checks, and its windows never share a token."""

import hashlib
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentei.core.errors import FileError, SenteiError
from sentei.measurement.text import cut, read_text, spare_of, windows_of


def test_the_default_text_is_long_and_the_same_each_time():
    text = read_text(None)
    assert text == read_text(None)
    assert len(text.text) > 300_000
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.text.startswith("assert\n======\n\n")
    assert text.text.index("\nassignment\n==========\n") < text.text.index("\nwhile\n=====\n")


def test_no_two_windows_of_the_default_text_share_a_long_passage():
    words = read_text(None).text.split()
    passages = [tuple(words[start:start + 64]) for start in range(len(words) - 63)]
    assert len(set(passages)) == len(passages)


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "my text.txt").write_bytes("\ufeffnaïve ✓\r\n".encode())
    text = read_text(tmp_path / "my text.txt")
    assert (text.name, text.text) == ("my text.txt", "naïve ✓\r\n")


@pytest.mark.parametrize(("make", "words"), [
    pytest.param(lambda path: None, "No such file", id="missing"),
    pytest.param(lambda path: path.write_bytes(b""), "empty", id="empty"),
    pytest.param(lambda path: path.write_bytes(b" \n\t"), "empty", id="blank"),
    pytest.param(lambda path: path.write_bytes(b"caf\xe9 au lait"), "0xe9 at position 3", id="not-utf8"),
    pytest.param(lambda path: path.write_bytes("wide".encode("utf-16")), "iconv -f UTF-16", id="utf16"),
    pytest.param(lambda path: path.write_bytes(b"a\0b\0"), "a NUL at position 1", id="nul"),
    pytest.param(lambda path: path.mkdir(), "a folder", id="folder"),
    pytest.param(os.mkfifo, "a device", id="pipe"),
    pytest.param(lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 29), "bytes", id="huge"),
])
def test_a_text_that_cannot_be_used_is_a_file_error(tmp_path, make, words):
    make(tmp_path / "text")
    with pytest.raises(FileError, match=words) as error:
        read_text(tmp_path / "text")
    assert error.value.exit_code == 3


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(length=st.integers(1, 7), counts=st.lists(st.integers(0, 5), max_size=4), spare=st.integers(0, 40))
def test_windows_are_disjoint_and_of_the_right_shape(length, counts, spare):
    needed = {f"use {index}": count for index, count in enumerate(counts)}
    windows = cut(range(sum(counts) * length + spare), length=length, needed=needed)
    assert {use: tuple(rows.shape) for use, rows in windows.items()} == {
        use: (count, length) for use, count in needed.items()}
    assert all(rows.dtype == torch.int64 for rows in windows.values())
    tokens = torch.cat([rows.flatten() for rows in windows.values()]) if windows else torch.empty(0)
    assert len(tokens.unique()) == len(tokens)
    for rows in windows.values():
        assert (rows.diff(dim=1) == 1).all()


def test_every_use_sees_the_whole_text():
    windows = cut(range(10_000), length=100, needed={"calibrate": 1, "choose": 4, "verify": 4})
    assert torch.equal(windows["verify"], cut(range(10_000), length=100, needed={
        "calibrate": 1, "choose": 4, "verify": 4})["verify"])
    for use in ("choose", "verify"):
        starts = windows[use][:, 0]
        assert starts[0] < 2500 and starts[-1] > 7400 and starts.diff().max() < 4000
    every = torch.cat(list(windows.values()))
    assert (every.min(), every.max()) == (0, 9999)


def test_a_text_that_is_too_short_says_how_long_it_must_be():
    with pytest.raises(FileError) as error:
        cut(range(499), length=100, needed={"calibrate": 1, "choose": 2, "verify": 2})
    assert "at least 500 tokens (5 windows of 100)" in error.value.expected
    assert "2,000 characters" in error.value.expected
    assert error.value.got == "499 tokens"
    cut(range(500), length=100, needed={"calibrate": 1, "choose": 2, "verify": 2})


@pytest.mark.parametrize(("length", "needed"), [(0, {"a": 1}), (4, {"a": -1})])
def test_impossible_windows_are_a_usage_error(length, needed):
    with pytest.raises(SenteiError):
        cut(range(10), length=length, needed=needed)


class Tokenizer:
    """One token a character; the first token, when it has one, comes before every text, and others after it."""

    def __init__(self, bos: int | None, marks: bool, *, cls: int | None = None, after: tuple[int, ...] = ()):
        self.bos_token_id, self.cls_token_id, self.sep_token_id, self.eos_token_id = bos, cls, 8, 9
        self.marks, self.after = marks, after

    def __call__(self, text, add_special_tokens=True, verbose=True):
        marked = add_special_tokens and self.marks
        first = [self.cls_token_id if self.bos_token_id is None else self.bos_token_id] if marked else []
        return {"input_ids": first + [ord(letter) for letter in text] + list(self.after if marked else ())}


def test_every_window_begins_with_the_first_token_of_a_model_that_has_one():
    windows = windows_of(Tokenizer(7, True), "abcdefgh", length=3, needed={"choose": 2, "verify": 1})
    rows = torch.cat(list(windows.values()))
    assert rows.shape == (3, 3) and (rows[:, 0] == 7).all()
    assert len(rows[:, 1:].unique()) == 6


@pytest.mark.parametrize("bos", [None, 7])
def test_no_token_is_put_before_a_window_where_the_tokenizer_puts_none(bos):
    windows = windows_of(Tokenizer(bos, False), "abcdefgh", length=4, needed={"choose": 2})
    assert sorted(windows["choose"].flatten().tolist()) == [ord(letter) for letter in "abcdefgh"]


def test_every_window_of_an_encoder_stands_between_its_own_tokens():
    tokenizer = Tokenizer(None, True, cls=7, after=(8,))
    windows = windows_of(tokenizer, "abcdefgh", length=4, needed={"choose": 2, "verify": 1})
    rows = torch.cat(list(windows.values()))
    assert rows.shape == (3, 4) and rows[:, 0].unique().tolist() == [7] and rows[:, -1].unique().tolist() == [8]
    assert len(rows[:, 1:-1].unique()) == 6
    spare = spare_of(tokenizer, "abcdefgh", length=4, needed={"choose": 2, "verify": 1}, size=3)
    assert all(row[0] == 7 and row[-1] == 8 for row in spare.tolist())
    assert not set(spare[:, 1].tolist()) & set(rows[:, 1:-1].flatten().tolist())


@pytest.mark.parametrize("after", [(8,), (9,)], ids=["sep", "eos"])
def test_no_window_of_a_language_model_ends_with_a_token_of_its_own(after):
    rows = windows_of(Tokenizer(7, True, after=after), "abcdefgh", length=3, needed={"choose": 2})["choose"]
    assert (rows[:, 0] == 7).all() and int(rows[:, 1:].min()) > 9
