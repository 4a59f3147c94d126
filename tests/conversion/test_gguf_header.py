"""The bounded GGUF reader: true files are read, lying ones refused; nothing is trusted to be inside the file."""

import struct

import pytest
from tiny import gguf_bytes, save_tiny_gguf

from sentei.conversion.gguf_header import MAX_ARRAY, QUANTISATIONS, read_header
from sentei.core.errors import FileError, UnsupportedError

NAME = {"general.architecture": "llama"}
ONE_KEY = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a"  # no tensors, one value, whose key is "a"
ONE = {"a": ((2, 32), 3, 0, bytes(40))}


def refused(tmp_path, data, error=FileError):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        read_header(path)
    assert caught.value.exit_code == error.exit_code


def test_a_tiny_model_is_read(tmp_path):
    model = save_tiny_gguf(tmp_path / "model.gguf", "llama")
    header = read_header(tmp_path / "model.gguf")
    assert header.elements == sum(parameter.numel() for parameter in model.parameters())
    assert header.quantisation == "F32"
    assert header.values["llama.attention.head_count_kv"] == 2
    assert header.tensors["blk.0.ffn_down.weight"].shape == (64, 96)


def test_the_table_of_types_is_that_of_the_gguf_package():
    import gguf

    for number, (name, block, block_bytes) in QUANTISATIONS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, block_bytes))


def test_every_truncation_is_refused(tmp_path):
    whole = gguf_bytes(NAME | {"tokens": ["a", "b"], "x": 1.5}, ONE)
    (tmp_path / "model.gguf").write_bytes(whole)
    assert read_header(tmp_path / "model.gguf").quantisation == "Q4_1"
    needed = len(whole) - 24  # the last 24 bytes are padding
    for kept in range(0, needed):
        refused(tmp_path, whole[:kept])


@pytest.mark.parametrize("data", [
    pytest.param(b"GGML" + bytes(60), id="another-magic"),
    pytest.param(gguf_bytes(NAME, ONE, version=1), id="version-1"),
    pytest.param(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(64), id="2^63-tensors"),
    pytest.param(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64), id="2^63-values"),
    pytest.param(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64), id="a-name-of-2^62-bytes"),
    pytest.param(ONE_KEY + struct.pack("<IIQ", 9, 12, 2**23) + bytes(64), id="an-array-beyond-the-file"),
    pytest.param(ONE_KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(64), id="an-array-of-arrays"),
    pytest.param(ONE_KEY + struct.pack("<I", 99) + bytes(64), id="unknown-type"),
    pytest.param(gguf_bytes(NAME | {"aa": 1, "ab": 1}, ONE).replace(b"ab", b"aa"), id="a-key-twice"),
    pytest.param(gguf_bytes(NAME | {"general.alignment": 0}, ONE), id="alignment-0"),
    pytest.param(gguf_bytes(NAME | {"general.alignment": 48}, ONE), id="alignment-48"),
    pytest.param(gguf_bytes(NAME, {}), id="no-tensors"),
    pytest.param(gguf_bytes(NAME, {"a": ((2**31, 2**31, 4), 0, 0, bytes(64))}), id="product-overflows-64-bits"),
    pytest.param(gguf_bytes(NAME, {"a": ((2**40,), 0, 0, bytes(64))}), id="shape-larger-than-the-file"),
    pytest.param(gguf_bytes(NAME, {"a": ((2,), 0, 2**40, bytes(64))}), id="offset-beyond-the-file"),
    pytest.param(gguf_bytes(NAME, {"a": ((2,), 0, 7, bytes(64))}), id="offset-not-aligned"),
    pytest.param(gguf_bytes(NAME, {"a": ((2, 31), 3, 0, bytes(64))}), id="row-not-of-whole-blocks"),
    pytest.param(gguf_bytes(NAME, {"a": ((16,), 0, 0, bytes(64)), "b": ((16,), 0, 32, bytes(64))}), id="overlap"),
    pytest.param(gguf_bytes(NAME, {"a": ((1,) * 5, 0, 0, bytes(64))}), id="five-dimensions"),
])
def test_a_lying_file_is_refused(tmp_path, data):
    refused(tmp_path, data)


def test_an_array_is_bounded_whatever_the_file_holds(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(ONE_KEY + struct.pack("<IIQ", 9, 8, MAX_ARRAY + 1) + bytes(64))
    with pytest.raises(FileError, match="an array of 16,777,217 values"):
        read_header(path)


def test_what_sentei_does_not_know_is_unsupported(tmp_path):
    refused(tmp_path, gguf_bytes(NAME, {"a": ((32,), 77, 0, bytes(64))}), UnsupportedError)
    refused(tmp_path, gguf_bytes(NAME | {"split.count": 3}, ONE), UnsupportedError)


def test_a_missing_file_is_a_file_error(tmp_path):
    with pytest.raises(FileError):
        read_header(tmp_path / "none.gguf")
