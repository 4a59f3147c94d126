"""What the tests of native code share."""

import pytest

from sentei.kernels import native


@pytest.fixture(params=range(1 if native.missing() else native.machines()), ids=lambda number: f"machine {number}")
def machine(request, monkeypatch) -> None:
    """Each instruction set of this processor in turn."""
    monkeypatch.setattr(native, "MACHINE", request.param)
