"""Whole files are read as safetensors reads them; files that lie are refused before anything is allocated."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from sentei.core.errors import FileError
from sentei.core.safetensors_header import read_header
from sentei.core.storage import MAX_JSON_PARTS


def written(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_real_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "empty": torch.zeros(0, 4),
               "scalar": torch.tensor(1.0)}, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: tensor.shape for name, tensor in header.items()} == {
        "a": (3, 5), "b": (7,), "empty": (0, 4), "scalar": ()}
    assert (header["b"].dtype, header["b"].elements, header["b"].bytes) == ("BF16", 7, 14)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(4)}, path)
    whole = path.read_bytes()
    for kept in range(len(whole)):
        path.write_bytes(whole[:kept])
        with pytest.raises(FileError):
            read_header(path)


@pytest.mark.parametrize(("header", "data"), [
    pytest.param(b"[]", b"", id="a-list"),
    pytest.param(b"{", b"", id="not-json"),
    pytest.param(b"\xff\xfe{}", b"", id="not-utf8"),
    pytest.param(b"[" * 100_000, b"", id="nested-deep"),
    pytest.param(b'{"a": ' + b"9" * 5000 + b"}", b"", id="a-number-of-5000-digits"),
    pytest.param(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
                 b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x", id="a-name-twice"),
    pytest.param({"a": entry() | {"extra": 1}}, bytes(8), id="an-extra-key"),
    pytest.param({"a": 1}, bytes(8), id="an-entry-that-is-a-number"),
    pytest.param({"a": entry(dtype="F128")}, bytes(8), id="unknown-dtype"),
    pytest.param({"a": entry(dtype=["F32"])}, bytes(8), id="dtype-is-a-list"),
    pytest.param({"a": entry(shape=(3,))}, bytes(8), id="shape-does-not-match"),
    pytest.param({"a": entry(shape=(-2,), offsets=(0, -8))}, bytes(8), id="negative"),
    pytest.param({"a": entry(shape=(2.0,))}, bytes(8), id="shape-is-a-float"),
    pytest.param({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4), id="shape-is-a-bool"),
    pytest.param({"a": entry(shape=(2**31, 2**31, 4), offsets=(0, 0))}, b"", id="product-overflows-64-bits"),
    pytest.param({"a": entry(shape=(2**64,), offsets=(0, 2**66))}, b"", id="size-beyond-64-bits"),
    pytest.param({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), id="overlap"),
    pytest.param({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), id="gap"),
    pytest.param({"a": entry()}, bytes(9), id="bytes-after-the-last-tensor"),
    pytest.param({"a": entry()}, bytes(7), id="offsets-beyond-the-file"),
    pytest.param({"__metadata__": {"format": 1}, "a": entry()}, bytes(8), id="metadata-not-text"),
    pytest.param({"__metadata__": {"format": "\ud800"}, "a": entry()}, bytes(8), id="metadata-half-a-pair"),
    pytest.param({"\ud800": entry()}, bytes(8), id="a-name-half-a-pair"),
])
def test_a_lying_file_is_refused(tmp_path, header, data):
    with pytest.raises(FileError) as error:
        read_header(written(tmp_path / "model.safetensors", header, data))
    assert error.value.exit_code == 3


def test_an_announced_header_beyond_the_file_is_not_read(tmp_path):
    with pytest.raises(FileError, match="header"):
        read_header(written(tmp_path / "model.safetensors", b"{}", length=2**63))


def test_a_bomb_of_empty_lists_is_not_parsed(tmp_path):
    with pytest.raises(FileError, match="values"):
        read_header(written(tmp_path / "model.safetensors", b'{"a":[' + b"[]," * (MAX_JSON_PARTS // 2 + 1) + b"0]}"))


def test_a_missing_file_is_a_file_error(tmp_path):
    with pytest.raises(FileError):
        read_header(tmp_path / "none.safetensors")
