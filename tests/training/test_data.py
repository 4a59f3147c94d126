"""Text as tokens: the same windows for the same (seed, step), none of them held out, and files that were changed."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_tokenizer

from sentei.core.errors import FileError, SenteiError
from sentei.training import data
from sentei.training.data import Bytes, Config, FromFile, Windows, prepare, texts_of, tokenizer_of

TEXTS = ["Grüße, 剪定. " * 40, "the second text " * 30]


def windows(folder, **changes) -> Windows:
    return Windows(prepare(TEXTS, Bytes(), folder), **{"context": 16, "held_out": 5, "seed": 0, **changes})


def test_bytes_go_there_and_back():
    text = "Grüße, 剪定"
    tokens = Bytes().encode(text).tolist()
    assert tokens == list(text.encode()) and Bytes().decode([*tokens, 256]) == text
    assert Bytes().decode([0xff, 65]) == "\ufffdA"


def test_the_file_holds_every_text_and_its_end_and_is_made_once(tmp_path):
    path = prepare(TEXTS, Bytes(), tmp_path)
    tokens = windows(tmp_path).tokens
    assert tokens.tolist() == [token for text in TEXTS for token in (*text.encode(), 256)]
    before = path.stat().st_mtime_ns
    assert prepare(TEXTS, Bytes(), tmp_path) == path and path.stat().st_mtime_ns == before
    assert prepare(TEXTS[:1], Bytes(), tmp_path) != path and prepare(TEXTS[::-1], Bytes(), tmp_path) != path


def test_a_tokenizer_json_is_read(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    tokenizer = tokenizer_of("words/tokenizer.json", tmp_path)
    tokens = tokenizer.encode("Grüße")
    assert tokenizer.decode(tokens.tolist()) == "Grüße" and tokenizer.end == 2
    assert 2 < tokens.min() and tokens.max() < tokenizer.vocabulary
    assert windows(tmp_path).sha256 != Windows(
        prepare(TEXTS, tokenizer, tmp_path), context=16, held_out=5, seed=0).sha256
    for wrong in ("words", "words/none.json", "tokenizer.json"):
        with pytest.raises(FileError):
            FromFile(tmp_path / wrong)
    (tmp_path / "words" / "tokenizer.json").write_text("{")
    with pytest.raises(FileError):
        FromFile(tmp_path / "words" / "tokenizer.json")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    class Wide(Bytes):
        vocabulary, identity = 70_000, "wide"

        def encode(self, text):
            return np.full(500, 69_999)

    found = Windows(prepare(["x"], Wide(), tmp_path), context=16, held_out=1, seed=0)
    assert int(found.batch(0, 2).max()) == 69_999


def test_each_window_is_read_once_an_epoch_and_no_held_out_one_ever(tmp_path):
    found = windows(tmp_path)
    number = len(found.places)
    size = next(size for size in (7, 5, 3, 2) if number % size == 0)
    epochs = [torch.cat([found.batch(step, size) for step in range(first, first + number // size)])
              for first in (0, number // size)]
    whole = found.tokens[:len(found.tokens) // 17 * 17].long().view(-1, 17)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(whole[found.places].tolist())
    assert not torch.equal(*epochs)
    places = found.held_places.tolist()
    assert len(set(places)) == 5 and not set(places) & set(found.places.tolist())
    assert torch.equal(found.held_out(), whole[places]) and max(np.diff(places)) <= len(whole) // 5 + 1


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    one, other = windows(tmp_path), windows(tmp_path)
    one.batch(9, 4)
    torch.manual_seed(5)
    assert torch.equal(one.batch(3, 4), other.batch(3, 4))
    assert not torch.equal(one.batch(3, 4), one.batch(4, 4))
    assert not torch.equal(windows(tmp_path, seed=1).batch(3, 4), one.batch(3, 4))
    assert torch.equal(torch.cat([one.batch(6, 2), one.batch(7, 2)]), one.batch(3, 4))


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(FileError, match="more than 5 windows of 500 tokens"):
        windows(tmp_path, context=499)


@pytest.mark.parametrize("at", [10, -1], ids=["header", "tokens"])
def test_a_file_that_was_changed_is_refused(tmp_path, at):
    path = prepare(TEXTS, Bytes(), tmp_path)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError):
        windows(tmp_path)
    path.write_bytes(raw[:-8])
    with pytest.raises(FileError):
        windows(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": data.FORMAT}, {"format": "x", "vocabulary": "257"},
                                      {"format": data.FORMAT, "vocabulary": "-1"},
                                      {"format": data.FORMAT, "vocabulary": "3", "sha256": "RIGHT"}], ids=str)
def test_a_file_of_something_else_is_refused(tmp_path, metadata):
    import hashlib

    tokens, path = torch.arange(200).to(torch.uint16), tmp_path / "tokens.safetensors"
    if metadata and "sha256" in metadata:
        metadata = metadata | {"sha256": hashlib.sha256(tokens.numpy()).hexdigest()}
    save_file({"tokens": tokens}, path, metadata=metadata)
    with pytest.raises(FileError):
        Windows(path, context=16, held_out=1, seed=0)


def test_texts_by_name_file_and_folder(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b", "a"):
        (tmp_path / "more" / f"{name}.txt").write_text(name)
    (tmp_path / "one.md").write_text("one")
    assert texts_of(("one.md", "more"), tmp_path) == ["one", "a", "b"]
    (documentation,) = texts_of(("python-documentation",), tmp_path)
    assert "The Python" in documentation
    for wrong in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileError):
            texts_of((wrong,), tmp_path)


def test_the_standard_library_is_read_without_its_tests(monkeypatch, tmp_path):
    files = {"a.py": "a = 1", "test/b.py": "b", "site-packages/c.py": "c", "d/e.py": "e", "f.py": " "}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    assert texts_of(("python-library",), tmp_path) == ["a = 1", "e"]


@pytest.mark.parametrize("changes", [{"text": ()}, {"text": "a"}, {"text": (1,)}, {"text": ("",)}, {"tokenizer": 1},
                                     {"context": 0}, {"context": True}, {"held_out": 0}, {"context": 1e9}], ids=str)
def test_a_configuration_that_cannot_be_is_refused(changes):
    with pytest.raises(SenteiError):
        Config(**changes)
