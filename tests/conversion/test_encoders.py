"""Encoders of transformers: read, wherever they stand in a file, or refused before memory is taken; and converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_encoder, tiny_encoder

from sentei.conversion.checkpoints import load_model, locate
from sentei.core.errors import FileError, UnsupportedError


def load(folder):
    return load_model(locate(str(folder)))


@pytest.fixture
def folder(tmp_path):
    return save_tiny_encoder(tmp_path / "bert")


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_it_computes_what_transformers_computes(head, tmp_path):
    made = tiny_encoder(head)
    model, tokens = load(save_tiny_encoder(tmp_path / "bert", head)), torch.arange(5, 17)[None]
    whole = made if head == "BertModel" else made.bert
    with torch.no_grad():
        assert torch.equal(model(tokens).last_hidden_state, whole(tokens).last_hidden_state)
    assert not model.training and model.pooler is None


def test_numbers_of_positions_are_left_where_they_are(folder):
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).config.num_hidden_layers == 2


@pytest.mark.parametrize(("change", "error", "said"), [
    ({"is_decoder": True}, UnsupportedError, "is_decoder"),
    ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type"),
    ({"architectures": ["BertLMHeadModel"]}, UnsupportedError, "architectures"),
    ({"architectures": "BertModel"}, UnsupportedError, "architectures"),
    ({"auto_map": {"AutoModel": "code.py"}}, FileError, "names code"),
    ({"rope_theta": 3.0}, FileError, "unknown key"),
    ({"hidden_size": 33}, FileError, "bert model|shape"),
    ({"hidden_size": 1 << 40}, FileError, "whole number"),
    ({"num_hidden_layers": 3}, FileError, "missing"),
    ({"num_hidden_layers": 1}, FileError, "not in the model"),
    ({"hidden_act": "os.system"}, FileError, "settings"),
    ({"quantization_config": {}}, UnsupportedError, "quantization_config"),
])
def test_what_is_no_encoder_of_ours_is_refused(change, error, said, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=said):
        load(folder)


@pytest.mark.parametrize(("name", "value", "error", "said"), [
    ("encoder.layer.1.output.dense.bias", torch.full((32,), torch.nan), FileError, "finite"),
    ("encoder.layer.1.output.dense.bias", torch.zeros(31), FileError, "shape"),
    ("encoder.layer.1.output.dense.bias", torch.zeros(32, dtype=torch.int64), UnsupportedError, "F32"),
    ("more", torch.zeros(2), FileError, "not in the model"),
])
def test_weights_that_do_not_fit_are_refused(name, value, error, said, folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: value}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=said):
        load(folder)


def test_pickles_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"model\.safetensors"):
        load(folder)


def test_loading_gives_transformers_its_words_back(tmp_path):
    from transformers.utils import logging

    folder, before = save_tiny_encoder(tmp_path / "bert", "BertForMaskedLM"), logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        load(folder)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
