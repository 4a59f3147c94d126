"""Tokenizers, built from data alone: tokenizer.json of a folder, or the vocabulary inside a GGUF file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from sentei.conversion.gguf_header import GgufHeader
from sentei.conversion.model_folder import check_side_files
from sentei.core.errors import FileError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model folder.

    Raises:
        FileError: tokenizer.json is missing, or a file of the tokenizer is malformed or names code.
    """
    from transformers import PreTrainedTokenizerFast

    check_side_files(folder)
    with _Building(folder):
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def read_gguf_tokenizer(folder: Path, file: str, header: GgufHeader) -> PreTrainedTokenizerFast:
    """The fast tokenizer made from the vocabulary of the GGUF file `file` in `folder`.

    Raises:
        FileError: a vocabulary that transformers cannot read.
    """
    from transformers import PreTrainedTokenizerFast

    with _Building(folder / file):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file=file, local_files_only=True,
                                                            trust_remote_code=False)
        tokenizer.clean_up_tokenization_spaces = False  # it would drop spaces when decoding
        # Some versions of transformers take other special tokens than the file says.
        for name, key in _SPECIAL.items():
            index = header.values.get(f"tokenizer.ggml.{key}_token_id")
            if type(index) is int and 0 <= index < len(tokenizer):
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    return tokenizer


def require_known(largest: int, vocabulary: int, where: str) -> None:
    """Raises FileError for a token that the model does not have.

    Args:
        largest: the largest number among the tokens of a text.
        vocabulary: how many the model has.
    """
    if largest >= vocabulary:
        raise FileError(where, expected=f"tokens below {vocabulary:,}, as the model has", got=f"{largest:,}",
                        do="use the tokenizer that belongs to the model")


class _Building(AbstractContextManager):
    """Turns the errors of building a tokenizer into FileError.

    The Rust tokenizers raise `Exception` itself for malformed data; this takes that class alone and not those under
    it, which an except clause cannot say. Where they panic the class is no `Exception`, and has no name to import.
    """

    kinds = (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError)

    def __init__(self, where: Path):
        self.where = where

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if kind is None:
            return
        if kind is Exception or issubclass(kind, self.kinds) or kind.__name__ == "PanicException":
            raise FileError(str(self.where), expected="a tokenizer that transformers can read", got=shown(error),
                            do="download the model again") from error
