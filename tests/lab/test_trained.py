"""The models that claims about training are measured on."""

import pytest
import torch

from sentei.lab import dynamic_vs_static, expert_subspaces, routing_neighbours


class StopError(Exception):
    """Raised where a claim would begin to train."""


@pytest.mark.parametrize("claim", [dynamic_vs_static, expert_subspaces, routing_neighbours])
def test_small_models_compute_on_one_thread_and_give_the_others_back(claim, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def train(*_):
        seen.append(torch.get_num_threads())
        raise StopError

    monkeypatch.setattr(claim, "mixture", train)
    torch.set_num_threads(2)
    try:
        with pytest.raises(StopError):
            claim.measure()
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
