"""What benchmarks/bench_encoder.py makes of an encoder, on a tiny one."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_encoder

from benchmarks.bench_encoder import STEP, calibrated, embeddings, identity, nameless, narrower


@pytest.mark.parametrize("word", ["MiniLM", "MiniLM/", "./MiniLM", "./MiniLM/"])
def test_a_page_names_no_folders(word):
    assert nameless(["bench", word, "--runs", "3"], Path(word)) == ["bench", "FOLDER", "--runs", "3"]


@torch.no_grad()
def test_a_model_is_known_by_its_weights():
    model, other = tiny_encoder(), tiny_encoder()
    assert identity(model) == identity(other) and f"width {model.config.hidden_size}," in identity(model)
    next(other.parameters())[0, 0] += 1
    assert identity(model) != identity(other)


@torch.no_grad()
def test_narrower_encoders_are_ordinary_and_near_the_dense_one():
    model, rows = tiny_encoder(), torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(0))
    dense, width = embeddings(model, rows), model.config.intermediate_size
    seen = calibrated(model, rows)
    assert torch.equal(embeddings(narrower(model, seen, 1.0), rows), dense)
    made = narrower(model, seen, 0.5)
    assert made.config.intermediate_size == STEP < width == model.config.intermediate_size
    again = type(model)(made.config, add_pooling_layer=False).eval()
    again.load_state_dict(made.state_dict(), strict=False)
    assert torch.equal(embeddings(again, rows), embeddings(made, rows))
    assert torch.equal(embeddings(model, rows), dense)
    first, plain = made.encoder.layer[0], model.encoder.layer[0]
    neurons = plain.intermediate.dense
    places = [int((neurons.weight == row).all(1).nonzero()) for row in first.intermediate.dense.weight]
    cut = plain.output.dense.weight[:, places]
    x = plain.attention(model.embeddings(rows))[0]
    whole, fitted = plain.output.dense(plain.intermediate(x)), first.output.dense(first.intermediate(x))
    plainly = torch.nn.functional.linear(first.intermediate(x), cut, plain.output.dense.bias)
    assert (fitted - whole).norm() < 0.9 * (plainly - whole).norm()
