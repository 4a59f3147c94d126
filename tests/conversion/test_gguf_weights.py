"""Weights written as llama.cpp writes them come back as transformers has them."""

import numpy
import pytest
import torch
from tiny import gguf_bytes, save_tiny_gguf

from sentei.conversion.families import family_of
from sentei.conversion.gguf_header import read_header
from sentei.conversion.gguf_weights import ARCHITECTURES, settings, weights
from sentei.core.errors import FileError, UnsupportedError


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_settings_come_back(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    model = save_tiny_gguf(path, architecture)
    header = read_header(path)
    raw = settings(path, header)
    config = family_of(raw).build_config(raw)
    found = weights(path, header, raw, torch.float32)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    for name in found:
        # Gemma's norm weights lose the last bit when one is added and taken away.
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6 if architecture == "gemma3" else 0)
    copy = type(model)._from_config(config, attn_implementation="sdpa").eval()
    copy.load_state_dict(found, strict=not config.tie_word_embeddings)
    tokens = torch.arange(64)[None]
    torch.testing.assert_close(copy(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [1, 2, 3, 8, 14, 30], ids=["F16", "Q4_0", "Q4_1", "Q8_0", "Q6_K", "BF16"])
def test_every_kind_of_block_is_unpacked(tmp_path, kind):
    import gguf

    name = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[name]
    random = numpy.random.default_rng(0)
    data = random.integers(0, 60, size=(4, 512 // block * block_bytes), dtype=numpy.uint8)
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(
        {"general.architecture": "qwen2"}, {"token_embd.weight": ((4, 512), kind, 0, data.tobytes())}))
    header = read_header(tmp_path / "model.gguf")
    found = weights(tmp_path / "model.gguf", header, {"model_type": "qwen2"}, torch.float32)
    expected = gguf.quants.dequantize(data.view(numpy.float16) if kind == 1 else data, name).astype(numpy.float32)
    assert torch.equal(found["model.embed_tokens.weight"], torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "rope_other.weight", "blk.00.attn_q.weight",
                                  "blk.0.attn_q.scale", "surprise"])
def test_a_tensor_without_a_place_is_unsupported(tmp_path, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, {name: ((8,), 0, 0, bytes(32))}))
    with pytest.raises(UnsupportedError):
        weights(path, read_header(path), {"model_type": "llama", "num_attention_heads": 2}, torch.float32)


@pytest.mark.parametrize(("values", "tensors"), [
    pytest.param({"general.architecture": "mamba"}, {}, id="architecture"),
    pytest.param({"general.architecture": 7}, {}, id="architecture-is-a-number"),
    pytest.param({"llama.rope.scaling.type": "yarn"}, {}, id="scaled-rotary"),
    pytest.param({}, {"rope_freqs.weight": ((8,), 0, 32, bytes(32))}, id="rotary-factors"),
])
def test_what_would_be_lost_is_refused(tmp_path, values, tensors):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"} | values,
                                {"token_embd.weight": ((1, 8), 0, 0, bytes(32))} | tensors))
    with pytest.raises(UnsupportedError):
        settings(path, read_header(path))


def test_a_file_without_an_embedding_is_a_file_error(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, {"output_norm.weight": ((8,), 0, 0, bytes(32))}))
    with pytest.raises(FileError, match="token_embd"):
        settings(path, read_header(path))
