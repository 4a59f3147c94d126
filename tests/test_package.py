"""The package root: every public name is there, and can be seen without being loaded."""

import pytest

import sentei


@pytest.mark.parametrize("name", sentei.__all__)
def test_every_public_name_resolves_to_the_thing_of_its_home(name):
    found = getattr(sentei, name)
    assert name == "__version__" or getattr(found, "__module__", sentei._HOMES[name]).startswith(sentei._HOMES[name])
    assert name == "__version__" or getattr(found, "__name__", name) == name


def test_dir_shows_every_public_name():
    assert set(sentei.__all__) <= set(dir(sentei)) and len(dir(sentei)) == len(set(dir(sentei)))


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sentei' has no attribute 'Prune'"):
        sentei.Prune  # noqa: B018
