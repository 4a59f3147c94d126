"""Losses are those of transformers, and quality is what its definition says."""

import math

import pytest
import torch
from tiny import tiny_model

from sentei.core.errors import SenteiError
from sentei.measurement import quality
from sentei.measurement.quality import COSINE, PERPLEXITY, RUN, compare, token_losses


@pytest.mark.parametrize("rows", [7, 1024], ids=["in slabs", "at once"])
@pytest.mark.parametrize("family, overrides", [("llama", {}), ("gemma3_text", {"final_logit_softcapping": 0.5})],
                         ids=["llama", "softcapped"])
def test_losses_are_those_of_transformers(monkeypatch, family, overrides, rows):
    monkeypatch.setattr(quality, "ROWS_AT_ONCE", rows)
    model, tokens = tiny_model(family, **overrides), torch.randint(3, 259, (2, 40))
    found = token_losses(model, tokens)
    assert found.shape == (2, 39) and found.dtype == torch.float64 and not found.requires_grad
    for row, losses in zip(tokens, found, strict=True):
        assert losses.mean().item() == pytest.approx(model(row[None], labels=row[None]).loss.item(), rel=1e-5)


def test_quality_is_dense_over_pruned_perplexity():
    dense, pruned = torch.full((2, 3), math.log(10.0)).double(), torch.full((2, 3), math.log(12.5)).double()
    found = compare(dense, pruned)
    assert (found.dense, found.pruned) == (pytest.approx(10), pytest.approx(12.5))
    assert found.value == found.low == found.high == pytest.approx(0.8) and found.tokens == 6


def test_the_interval_is_over_means_of_runs_of_neighbours():
    """Four runs of means 0, 1, 2 and 3 nats: mean 1.5, standard error 1.29 / 2, whatever happens inside a run."""
    inside = torch.tensor([9.0, -9.0]).repeat(RUN // 2).double()
    change = torch.stack([torch.cat([inside, inside + 1]), torch.cat([inside + 2, inside + 3])])
    found = compare(torch.zeros(2, 2 * RUN).double(), change)
    margin = 1.96 * math.sqrt(5 / 3) / 2
    assert math.log(found.value) == pytest.approx(-1.5)
    assert (math.log(found.low), math.log(found.high)) == (pytest.approx(-1.5 - margin), pytest.approx(-1.5 + margin))


def test_a_single_run_has_no_interval_and_is_refused():
    with pytest.raises(SenteiError, match="quality: expected at least two runs of 64 tokens, got one"):
        compare(torch.zeros(1, RUN), torch.zeros(1, RUN))
    assert compare(torch.zeros(2, 1), torch.ones(2, 1)).low > 0


def turned(*cosines: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of two models, of which those of each text have that cosine, and other lengths."""
    angles = torch.tensor(cosines, dtype=torch.float64).acos()
    return torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(cosines), 2), 3 * torch.stack(
        [angles.cos(), angles.sin()], -1)


def test_the_quality_of_an_encoder_is_the_mean_cosine_and_its_interval_is_over_texts():
    """Of 0.90, 0.92 and 0.94 the mean is 0.92, its standard error 0.02 / √3, and Student's t 4.303."""
    found = COSINE.compare(*turned(0.90, 0.92, 0.94))
    assert found.value == pytest.approx(0.92) and found.tokens == 3 and found.dense is found.pruned is None
    assert (found.low, found.high) == (pytest.approx(0.92 - 4.303 * 0.02 / 3**0.5),
                                       pytest.approx(0.92 + 4.303 * 0.02 / 3**0.5))
    assert found.nats == pytest.approx(-math.log(0.92))


def test_no_cosine_is_above_one_and_none_has_a_loss_that_is_not_finite():
    assert COSINE.compare(*turned(0.9, 1.0)).high == 1.0
    assert math.isfinite(COSINE.compare(*turned(-1.0, -0.5)).nats) and math.isfinite(COSINE.nats(*turned(-1.0)))
    with pytest.raises(SenteiError, match="quality: expected at least two texts, got one"):
        COSINE.compare(*turned(0.9))


def test_a_loss_is_told_in_the_measure():
    assert PERPLEXITY.lost(math.log(1.1), 20.0) == pytest.approx(2.0)
    assert COSINE.lost(-math.log(0.9), None) == pytest.approx(0.1) and COSINE.level(torch.ones(2, 3)) is None
    assert PERPLEXITY.level(torch.full((2, 3), math.log(7.0))) == pytest.approx(7.0)
