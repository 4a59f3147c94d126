"""Every claim of the lecture is in the table, in a file that looks like the others."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from sentei.core.errors import SenteiError
from sentei.core.progress import Silent
from sentei.lab import table
from sentei.lab.records import measure
from sentei.lab.table import CLAIMS, chosen


@pytest.mark.parametrize("number, name", list(enumerate(CLAIMS.values(), 1)))
def test_a_claim_is_one_file(number, name):
    module = importlib.import_module(f"sentei.lab.{name}")
    assert module.__doc__.startswith(f"Claim {number}") and "Source: " in module.__doc__
    assert isinstance(module.CLAIM, str) and module.CLAIM.endswith(".")
    assert all(given.default is not inspect.Parameter.empty
               for given in inspect.signature(module.measure).parameters.values())
    assert "Cost: " in module.measure.__doc__ and callable(module.judge)


def test_every_file_with_a_claim_is_in_the_table():
    texts = {path.stem: path.read_text() for path in Path(table.__file__).parent.glob("*.py")}
    assert {stem for stem, text in texts.items() if re.search(r"^CLAIM = ", text, re.M)} == set(CLAIMS.values())
    assert [name.replace("-", "_") for name in CLAIMS] == list(CLAIMS.values()) and len(CLAIMS) == 11


def test_all_means_every_claim_in_order():
    assert chosen(["all"]) == list(CLAIMS) == chosen(["snr", "all"])
    assert chosen(["snr", "orthogonality"]) == ["orthogonality", "snr"]
    with pytest.raises(SenteiError, match="flat"):
        chosen(["flat"])
    with pytest.raises(SenteiError, match="none"):
        chosen([])


def test_a_record_tells_the_threads_it_was_measured_on(monkeypatch):
    from sentei.lab import one_structure, snr
    from sentei.lab.trained import one_thread

    before, found, seen = torch.get_num_threads(), one_structure.measure(), []

    def finding():
        seen.append(str(torch.get_num_threads()))
        return found

    monkeypatch.setattr(snr, "measure", one_thread(finding))
    monkeypatch.setattr(one_structure, "measure", finding)
    torch.set_num_threads(2)
    try:
        told = [record["environment"]["threads"] for _, record, _ in measure(["snr", "one-structure"], Silent())]
        assert told == seen == ["1", "2"] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_record_tells_where_and_how_long():
    [(name, record, _)] = measure(["one-structure"], Silent())
    assert name == "one-structure" == record["name"] and record["seconds"] > 0 and record["schema"] == "sentei.lab/1"
    assert record["environment"]["threads"] and record["finding"]["verdict"] == "holds"
