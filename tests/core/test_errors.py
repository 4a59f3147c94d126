"""Four parts, and the exit code each class stands for."""

import pytest

from sentei.core import errors

CODES = {
    "SenteiError": 2,
    "ShapeError": 2,
    "RuleError": 2,
    "ImplError": 2,
    "FileError": 3,
    "ResourceError": 4,
    "UnsupportedError": 5,
}


def all_errors() -> dict[str, type]:
    return {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_error_has_its_exit_code():
    assert {name: error.exit_code for name, error in all_errors().items()} == CODES


@pytest.mark.parametrize("name", CODES)
def test_an_error_tells_its_four_parts(name):
    error = all_errors()[name]("config.json", expected="a number", got="a word", do="write a number")
    assert isinstance(error, errors.SenteiError) and isinstance(error, ValueError)
    assert str(error) == "config.json: expected a number, got a word; write a number"
    assert error.lines().splitlines() == [
        "error    config.json", "expected a number", "got      a word", "do this  write a number"]
    assert (error.where, error.expected, error.got, error.do) == ("config.json", "a number", "a word", "write a number")


@pytest.mark.parametrize("missing", ["expected", "got", "do"])
def test_no_part_may_be_left_out(missing):
    parts = {"expected": "a", "got": "b", "do": "c"}
    del parts[missing]
    with pytest.raises(TypeError, match=missing):
        errors.SenteiError("here", **parts)


def test_require_names_the_first_check_that_fails():
    errors.require("here", 1, {"a": True})
    with pytest.raises(errors.SenteiError, match="here: expected b, got 'x'"):
        errors.require("here", "x", {"a": True, "b": False, "c": False})
