"""What the tests of native code share."""

import pytest
import torch

from sentei.kernels import native

MACHINES = 1 if native.missing() else native.machines()
SETS = min(3, MACHINES)  # the fourth is the third but for products of pairs


def named(number: int) -> str:
    """The test's name for an instruction set."""
    return f"machine {number}"


def sets(count: int) -> list:
    """The first `count` instruction sets; those between the plainest and the last are slow: others end there."""
    return [pytest.param(number, marks=[pytest.mark.slow] if 0 < number < SETS - 1 else []) for number in range(count)]


@pytest.fixture(params=sets(SETS), ids=named)
def machine(request, monkeypatch) -> None:
    """Each instruction set of this processor in turn."""
    monkeypatch.setattr(native, "MACHINE", request.param)


@pytest.fixture(params=sets(MACHINES), ids=named)
def machine_or_pairs(request, monkeypatch) -> None:
    """Each instruction set of this processor in turn, and products of pairs."""
    monkeypatch.setattr(native, "MACHINE", request.param)


@pytest.fixture
def poison():
    """Uninitialised memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
