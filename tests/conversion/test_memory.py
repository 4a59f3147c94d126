"""Memory is asked for before it is taken."""

from pathlib import Path

import pytest

from sentei.conversion.memory import available_memory, require_memory
from sentei.core.errors import ResourceError


def test_this_machine_has_some_memory_but_not_all():
    require_memory(Path("model"), 1)
    assert 1 << 26 < available_memory() < 1 << 50
    with pytest.raises(ResourceError, match="GB of memory") as error:
        require_memory(Path("model"), 1 << 60)
    assert error.value.exit_code == 4
