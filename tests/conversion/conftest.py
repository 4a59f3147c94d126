"""What the tests of native layers share."""

import pytest

from sentei.conversion import native


@pytest.fixture
def always(monkeypatch) -> None:
    """Whatever is faster here, few rows and many are native."""
    right = native.install
    monkeypatch.setattr(native, "install", lambda model: right(model, most_rows=8, many_rows=9))
