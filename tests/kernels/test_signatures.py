"""Implementations of one operation are interchangeable: same parameters, order, defaults and returns."""

import inspect
import re
from pathlib import Path

import pytest

import sentei.kernels
from sentei.kernels import attention, linear, paging, routing, topk

OPERATIONS = {"attention": (attention.attend, attention.IMPLS), "routing": (routing.route, routing.IMPLS),
              "topk": (topk.attend_topk, topk.IMPLS), "paging": (paging.attend, paging.IMPLS),
              "linear": (linear.linear, linear.IMPLS)}


def differences(door, implementations: dict) -> list[str]:
    """What each implementation's signature lacks or has beside the door's, `impl` and the default of scale apart."""
    wrong = []
    expected = inspect.signature(door)
    for name, function in implementations.items():
        own = inspect.signature(function)
        kinds = [(p.name, p.kind) for p in own.parameters.values()]
        if kinds != [(p.name, p.kind) for p in expected.parameters.values() if p.name != "impl"]:
            wrong.append(f"{name}: {own} instead of {expected}")
        for parameter in own.parameters.values():
            same = expected.parameters.get(parameter.name, parameter)
            if parameter.default not in (same.default, inspect.Parameter.empty):
                wrong.append(f"{name}: another default of {parameter.name}")
        if own.return_annotation != expected.return_annotation:
            wrong.append(f"{name}: returns {own.return_annotation}")
        if function.__name__ != door.__name__:
            wrong.append(f"{name}: is called {function.__name__}")
    return wrong


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_implementation_has_the_signature_of_the_door(operation):
    assert differences(*OPERATIONS[operation]) == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_implementations_have_identical_signatures(operation):
    _, implementations = OPERATIONS[operation]
    assert len({str(inspect.signature(function)) for function in implementations.values()}) == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_door_alone_chooses_the_implementation(operation):
    door, implementations = OPERATIONS[operation]
    assert inspect.signature(door).parameters["impl"].default == "auto"
    assert all("impl" not in inspect.signature(function).parameters for function in implementations.values())


def test_the_scores_of_pages_have_one_signature_too():
    assert differences(paging.score, paging.SCORES) == [] and set(paging.SCORES) == set(paging.IMPLS)


def test_every_operation_is_looked_at():
    folders = {path.parent.name for path in Path(sentei.kernels.__path__[0]).glob("*/__init__.py")}
    assert folders - {"native"} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_implementation_file_is_in_the_table(operation):
    folder = Path(sentei.kernels.__path__[0]) / operation
    files = {path.stem for path in folder.glob("*.py") if re.match("reference|eager|masked|flex|fused_", path.stem)}
    assert files == set(OPERATIONS[operation][1])


def door(query, *, scale: float = 1.0, impl: str = "auto") -> int: ...


def renamed(query, *, factor: float = 1.0) -> int: ...


def positional(query, scale: float = 1.0) -> int: ...


def defaulted(query, *, scale: float = 2.0) -> int: ...


def retyped(query, *, scale: float = 1.0) -> str: ...


@pytest.mark.parametrize("function", [renamed, positional, defaulted, retyped], ids=lambda function: function.__name__)
def test_a_signature_that_differs_is_noticed(function):
    function.__name__ = "door"
    assert len(differences(door, {"wrong": function})) == 1
