"""Tokenizers come from data alone, and broken ones are file errors."""

import pytest
from tiny import save_tiny_gguf, tiny_tokenizer

from sentei.conversion.gguf_header import read_header
from sentei.conversion.tokenizers import read_gguf_tokenizer, read_tokenizer
from sentei.core.errors import FileError


def test_a_saved_tokenizer_comes_back(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    ids = tokenizer("naïve ✓").input_ids
    assert ids == tiny_tokenizer()("naïve ✓").input_ids
    assert tokenizer.decode(ids) == "naïve ✓"
    assert (tokenizer.eos_token_id, tokenizer.is_fast) == (2, True)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0"}', '{"model": {"type": "Surprise"}}',
                                  '{"model": 1}'])
def test_a_broken_tokenizer_is_a_file_error(tmp_path, text):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FileError):
        read_tokenizer(tmp_path)


def test_other_exceptions_pass(tmp_path, monkeypatch):
    import transformers

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_tokenizer(tmp_path)


def test_a_gguf_vocabulary_keeps_its_special_tokens(tmp_path):
    save_tiny_gguf(tmp_path / "model.gguf", "llama")
    tokenizer = read_gguf_tokenizer(tmp_path, "model.gguf", read_header(tmp_path / "model.gguf"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer("two words", add_special_tokens=False).input_ids
    assert ids == tiny_tokenizer()("two words").input_ids
    assert tokenizer.decode(ids) == "two words"


def test_a_broken_gguf_vocabulary_is_a_file_error(tmp_path):
    save_tiny_gguf(tmp_path / "model.gguf", "llama", **{"tokenizer.ggml.merges": ["a b", "c d"]})  # no token "ab"
    with pytest.raises(FileError, match="transformers can read"):
        read_gguf_tokenizer(tmp_path, "model.gguf", read_header(tmp_path / "model.gguf"))
