"""A verdict comes from the numbers and their intervals alone, and a finding survives its file."""

import json

import pytest

from sentei.core.errors import FileError, SenteiError
from sentei.lab.finding import FAILS, HOLDS, OPEN, Check, Finding, counted, disturbed, measured, number
from sentei.lab.records import lines
from sentei.measurement.charts import Chart, Series


def finding(*checks: Check, **changes) -> Finding:
    chart = Chart(title="t", x="x", y="y", series=(Series(name="s", x=(1.0, 2.0), y=(1.0, 3.0)),))
    return Finding(**{"claim": "All is well.", "rows": ({"a": 1, "b": "two", "c": 0.5},), "charts": (chart,),
                      "checks": checks or (counted("it is", 1.0, 1.0),), "notes": ("n",),
                      "heat": ((0.5, 1.0),)} | changes)


@pytest.mark.parametrize(("interval", "claimed", "verdict"), [
    ((1.0, 0.9, 1.1), {"least": 0.9, "most": 1.1}, HOLDS),
    ((1.0, 0.9, 1.11), {"least": 0.9, "most": 1.1}, OPEN),
    ((1.0, 0.89, 1.1), {"least": 0.9, "most": 1.1}, OPEN),
    ((1.0, 0.5, 2.0), {"least": 0.9, "most": 1.1}, OPEN),
    ((1.3, 1.2, 1.4), {"least": 0.9, "most": 1.1}, FAILS),
    ((0.8, 0.7, 0.89), {"least": 0.9, "most": 1.1}, FAILS),
    ((2.0, 1.5, 9.0), {"least": 1.5}, HOLDS),
    ((2.0, 1.4, 9.0), {"least": 1.5}, OPEN),
    ((2.0, 1.5, 9.0), {"most": 1.4}, FAILS),
    ((0.0, 0.0, 0.0), {"least": 0, "most": 0}, HOLDS),
    ((1.0, 1.0, 1.0), {"least": 0, "most": 0}, FAILS),
])
def test_a_check_is_told_by_its_interval(interval, claimed, verdict):
    assert measured("it is", interval, **claimed).verdict == verdict


@pytest.mark.parametrize("low", [0.9, -1.0], ids=["holds else", "fails else"])
def test_a_number_in_doubt_is_not_judged(low):
    check = measured("it is", (low, low, low), least=0.0, doubt="the clock stood still")
    assert check.verdict == OPEN and check.words().endswith("claimed at least 0; not judged, the clock stood still")
    made = finding(check)
    assert Finding.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_check_of_before_doubts_is_read():
    value = finding().to_json()
    assert value["checks"][0].pop("doubt") == "" and Finding.from_json(value) == finding()


@pytest.mark.parametrize(("spent", "told"), [
    ((1, 2, 3), ""), ((2, 2, 2), ""), ((2, 1.85, 3), ""), ((2, 3, 1.5), "3 ms for 2 n and 1.5 ms for 4"),
    ((9, 4, 5), "9 ms for 1 n and 4 ms for 2"), ((5, 9, 4), "9 ms for 2 n and 4 ms for 4"),
], ids=str)
def test_more_work_in_less_time_is_a_disturbance(spent, told):
    rows = [{"n": size, "ms": time, "ms low": time - 0.1, "ms high": time + 0.1}
            for size, time in zip((1, 2, 4), spent, strict=True)]
    for given in (rows, rows[::-1]):
        assert disturbed("work", given, "n", "ms") == (told and f"the machine was disturbed: work took {told}")


@pytest.mark.parametrize(("numbers", "claimed"), [
    ((1.0, float("nan"), 2.0), {"least": 0}), ((1.0, 1.5, 2.0), {"least": 0}), ((1.0, 0.5, float("inf")), {"least": 0}),
    ((1.0, 1.0, 1.0), {}), ((1.0, 1.0, 1.0), {"least": 2, "most": 1}), ((1.0, 1.0, 1.0), {"most": float("nan")}),
])
def test_a_check_of_no_numbers_is_refused(numbers, claimed):
    with pytest.raises(SenteiError):
        measured("it is", numbers, **claimed)


def test_a_claim_is_as_good_as_its_worst_check():
    good, shaky, bad = (measured(name, interval, least=1) for name, interval in (
        ("good", (2, 1, 3)), ("shaky", (1, 0, 2)), ("bad", (0, 0, 0.5))))
    assert finding(good, good).sentence == "The claim holds: good 2 (1 to 3), claimed at least 1; 2 of 2 checks hold."
    assert finding(good, within="2 %").sentence == "The claim holds within 2 %: good 2 (1 to 3), claimed at least 1."
    assert finding(good, shaky, within="2 %").sentence == (
        "The claim is open: shaky 1 (0 to 2), claimed at least 1; 1 of 2 checks hold.")
    assert finding(good, shaky, bad).verdict == FAILS and ": bad 0 " in finding(good, shaky, bad).sentence


def test_a_finding_survives_its_file():
    made = finding(measured("m", (1.0, 0.5, 2.0), least=0.0), counted("c", 3, 3))
    assert Finding.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("change", [
    lambda value: value.pop("rows"), lambda value: value.update(rows=[]), lambda value: value.update(checks=[]),
    lambda value: value["rows"].append({"other": 1}), lambda value: value["rows"][0].update(a=[1]),
    lambda value: value["checks"][0].update(low="x"), lambda value: value["checks"][0].update(doubt=1),
    lambda value: value["checks"][0].update(more=1),
    lambda value: value["charts"][0]["series"][0].update(x=[1.0]), lambda value: value.update(heat=[["x"]]),
    lambda value: value.update(claim=3), lambda value: value.update(charts=7), lambda value: value.update(notes=None),
])
def test_another_file_is_refused(change):
    value = json.loads(json.dumps(finding().to_json()))
    change(value)
    with pytest.raises(FileError):
        Finding.from_json(value)


def test_a_verdict_in_a_file_is_not_believed():
    value = finding(counted("it is", 2.0, 1.0)).to_json() | {"verdict": HOLDS}
    assert Finding.from_json(value).verdict == FAILS


def test_a_table_stands_in_columns():
    rows = ({"name": "a", "n": 5, "x": 0.12345}, {"name": "long", "n": 12_000, "x": 1e-7})
    assert lines(finding(rows=rows)) == ["name       n       x", "a          5  0.1235", "long  12,000   1e-07"]
    assert [number(value) for value in ("a", 1234, 12345.6, 0.5)] == ["a", "1,234", "12,346", "0.5"]
