"""Each claim of the lab, small: it holds where it should, and a world in which it is false is told from ours."""

import pytest
import torch

from sentei.geometry.orthogonality import unit_vectors
from sentei.geometry.snr import readouts
from sentei.lab import orthogonality, snr
from sentei.lab.finding import FAILS, HOLDS


def test_random_directions_are_nearly_orthogonal():
    found = orthogonality.measure(dimensions=(64, 256), batches=12)
    assert found.verdict == HOLDS and "within 2 %" in found.sentence
    assert all(abs(row["variance × d"] - 1) < 0.02 for row in found.rows)


@pytest.mark.parametrize("draw", [
    lambda *given: unit_vectors(*given).abs(),  # all in one orthant: the mean is not 0
    lambda number, size, generator: unit_vectors(number, size // 2, generator).repeat(1, 2) / 2**0.5,  # half of them
])
def test_other_directions_are_not(draw):
    found = orthogonality.measure(dimensions=(64,), batches=8, draw=draw)
    assert found.verdict == FAILS and found.sentence.startswith("The claim does not hold: ")


def test_a_dense_readout_drowns_a_signal():
    found = snr.measure(dense=(32, 256), batches=24)
    assert found.verdict == HOLDS
    dense = [row["SNR"] for row in found.rows if row["read-out"] == "dense"]
    assert dense[1] < dense[0] / 10


def test_signal_everywhere_does_not_drown():
    def read(right, wrong, number, generator):
        return readouts(right + wrong // 2, wrong, number, generator)

    assert snr.measure(dense=(32, 256), batches=8, read=read).verdict == FAILS


def test_a_selection_that_lets_noise_in_restores_nothing():
    def read(right, wrong, number, generator):
        signal, noise = readouts(right, wrong, number, generator)
        return signal, noise + torch.randn(number, generator=generator).double() * (wrong == 0)

    found = snr.measure(dense=(32,), batches=8, read=read)
    assert found.verdict == FAILS and "right dimensions" in found.sentence
