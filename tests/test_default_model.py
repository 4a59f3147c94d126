"""The embedded default model, real weights and real text: keep-all changes nothing. Slow."""

from pathlib import Path

import pytest
import torch

from sentei.axes.connections import Config, Connections
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import All
from sentei.kernels.attention import Tiles
from sentei.measurement.text import read_text

pytestmark = pytest.mark.slow
NEW_TOKENS = 64
LENGTHS = {1: [600], 3: [600, 450, 131]}  # rows of the batch, tokens each; the window and block size are passed in all
CASES = pytest.mark.parametrize(("batch", "use_cache"), [(1, True), (1, False), (3, True), (3, False)],
                                ids=lambda value: {1: "one row", 3: "three padded rows"}.get(value, str(value)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cache = Path.home() / ".cache" / "sentei"
    return locate(cache=cache if cache.exists() else tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def dense(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def kept(checkpoint):
    """The same model with a keep-all room in every layer."""
    model = load_model(checkpoint)
    return convert(model, Plan.everywhere(prunable_layers(model), "connections", Config(rule=All())))


@pytest.fixture(params=["dense kernel", "tile by tile"])
def kernel(request, monkeypatch):
    """Keep-all through torch's own kernel, as a user gets it, and through the kernel for pruned plans."""
    def tiles(self, selection, query, key, lengths=None):
        return Tiles.from_mask(selection.mask(), self.grid(query, key, lengths))

    if request.param == "tile by tile":
        monkeypatch.setattr(Connections, "tiles", tiles)


@pytest.fixture(scope="module")
def text(checkpoint) -> list[int]:
    return load_tokenizer(checkpoint)(read_text(None).text[100_000:120_000])["input_ids"]


def inputs(text: list[int], batch: int, tokens: int = 600) -> dict[str, torch.Tensor]:
    """Rows of real text, padded at the left to the longest."""
    rows = [text[1000 * row:1000 * row + min(length, tokens)] for row, length in enumerate(LENGTHS[batch])]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, data: dict, use_cache: bool) -> torch.Tensor:
    return model(**data, use_cache=use_cache).logits[data["attention_mask"].bool()]


@CASES
def test_logits_are_those_of_the_dense_model(dense, kept, kernel, text, batch, use_cache):
    data = inputs(text, batch)
    torch.testing.assert_close(logits(kept, data, use_cache), logits(dense, data, use_cache), rtol=0, atol=1e-4)


@CASES
def test_greedy_continuations_are_identical(dense, kept, kernel, text, batch, use_cache):
    settings = {**inputs(text, batch, tokens=200), "use_cache": use_cache, "do_sample": False, "pad_token_id": 0,
                "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    assert torch.equal(kept.generate(**settings), dense.generate(**settings))
