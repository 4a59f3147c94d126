"""Healing: the loss is the divergence from the dense model, the clock bounds it, and a kill changes nothing."""

import json

import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import kl_div

from sentei.axes import heads, weights
from sentei.axes.rank import Config as Rank
from sentei.conversion import adapters
from sentei.conversion.plan import Plan
from sentei.conversion.student import adapted, student_of
from sentei.core.errors import FileError, SenteiError
from sentei.core.rules import TopK
from sentei.training import healing
from sentei.training.healing import Clock, Config, Texts, heal
from sentei.training.loop import METRICS, Optimizer

PLAN = Plan((*Plan.everywhere(range(3), "weights", weights.Config(rule=TopK(32), saliency="magnitude")).entries,
             *Plan.everywhere(range(3), "heads", heads.Config(num_kv_heads=1)).entries))


class Killed(BaseException):
    """Stands for a kill."""


class Passes:
    """A clock that stands still but for the student's passes, of a second each."""

    def __init__(self, student):
        self.seconds = 0.0
        student.model.register_forward_pre_hook(self.tick)

    def tick(self, *_):
        self.seconds += 1

    def __call__(self):
        return self.seconds


def texts(rows=12, seed=0):
    drawn = torch.Generator().manual_seed(1)
    return Texts(rows=torch.randint(3, 259, (rows, 24), generator=drawn),
                 checks=torch.randint(3, 259, (2, 32), generator=drawn), seed=seed)


def config(minutes=1.0, **changes):
    return Config(minutes=minutes, rank=Rank(rank=4), optimizer=Optimizer(rate=1e-2, warmup=3, final=0.02, decay=0.0),
                  **changes)


def started(folder, given=None, step=lambda note: None, job=None, **times):
    """A healing of the tiny model from the start, in what would be a process of its own."""
    teacher = tiny_model("llama")
    student, _ = student_of(teacher, PLAN)
    torch.manual_seed(0)
    adapted(student, Rank(rank=4))
    clock = Passes(student)
    found = heal(teacher, student, texts() if given is None else given, config(**times), folder, job=job or {},
                 step=step, now=clock)
    return found, student, clock


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A healing that nothing cut off, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return *started(folder, job={"text": "one"}), folder


def test_the_divergence_from_the_dense_model_falls(whole):
    found, *_ = whole
    assert sum(found.losses[-8:]) < 0.7 * sum(found.losses[:8])


def test_loss_and_gradient_are_those_of_the_whole_divergence(tmp_path, monkeypatch):
    """The first step's loss and gradient against one product of all rows; slabs of 7 of 24 rows."""
    monkeypatch.setattr(healing, "ROWS_AT_ONCE", 7)
    teacher = tiny_model("llama")
    student, _ = student_of(teacher, PLAN)
    adapted(student, Rank(rank=4))
    for adapter in adapters.adapters_of(student).values():
        torch.nn.init.normal_(adapter.b, std=0.1)
    given = texts()
    run = healing._Healer(teacher, student, given, config(), tmp_path, {}, lambda: 0.0)
    loss, added = run.gradients(0)
    own = {name: parameter.grad.clone() for name, parameter in run.named.items()}
    run.adam.zero_grad()
    row = given.batch(0, 1)
    with torch.no_grad():
        dense = teacher(input_ids=row).logits.log_softmax(-1)
    whole = kl_div(student(input_ids=row).logits.log_softmax(-1), dense, reduction="sum", log_target=True) / 24
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5) and added == 0.0 and len(own) == 42
    for name, parameter in run.named.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_clock_bounds_everything_and_is_used(whole):
    found, _, clock, _ = whole
    assert 52 < clock.seconds <= 60
    assert len(found.losses) == found.table[-1]["step"] and found.table[-1]["minutes"] == clock.seconds / 60


def test_a_part_of_the_minutes_is_kept_to_and_named_where_it_is_too_little(tmp_path):
    _, _, clock = started(tmp_path / "half", part=0.5)
    assert 22 < clock.seconds <= 30
    with pytest.raises(SenteiError, match=r"more than 0.667 minutes, .* fit in 0.1 of the time, got 0.5"):
        started(tmp_path / "little", minutes=0.5, part=0.1)
    with pytest.raises(SenteiError, match=r"healing.part: expected a number above 0 and at most 1"):
        config(part=1.5)


def test_a_row_for_what_is_checked_from_before_the_first_step_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "SECONDS", 15)
    found, _, clock = started(tmp_path, minutes=0.75)
    seconds = [round(60 * row["minutes"]) for row in found.table]
    assert seconds[:3] == [2, 19, 36] and len(seconds) == 4 and 36 < seconds[3] <= 45
    assert found.table[0]["step"] == found.table[0]["tokens"] == 0
    assert [row["tokens"] for row in found.table] == [24 * row["step"] for row in found.table]
    assert clock.seconds <= 45


def test_the_rate_goes_down_with_the_time(whole):
    rows = [json.loads(line) for line in (whole[3] / METRICS).read_text().splitlines()]
    rates = [row["rate"] for row in rows[1:]]
    assert max(rates) == rates[2] == 1e-2 and rates[20] > rates[40] > rates[-1] and rates[-1] < 1e-3


@pytest.mark.parametrize("last", [1, 7, 20])
def test_killed_at_any_step_it_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, last):
    step, done = healing._Healer.step, []

    def kill(self, number):
        if len(done) == last:
            raise Killed
        done.append(number)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(healing._Healer, "step", kill)
        with pytest.raises(Killed):
            started(tmp_path, job={"text": "one"})
    went = []
    monkeypatch.setattr(healing._Healer, "step", lambda self, number: went.append(number) or step(self, number))
    found, student, _ = started(tmp_path, job={"text": "one"})
    assert went[0] == (0 if last < 4 else last - (last - 4) % 6)  # a checkpoint every tenth of the time
    assert found == whole[0]
    assert all(torch.equal(tensor, other) for tensor, other in zip(
        student.state_dict().values(), whole[1].state_dict().values(), strict=True))


def test_what_is_finished_is_not_done_again(whole, monkeypatch):
    monkeypatch.setattr(healing._Healer, "step", lambda *_: pytest.fail("a step was done again"))
    found, student, _ = started(whole[3], job={"text": "one"})
    assert found == whole[0]
    assert all(torch.equal(tensor, other) for tensor, other in zip(
        student.state_dict().values(), whole[1].state_dict().values(), strict=True))


def test_a_checkpoint_of_another_job_is_refused(whole):
    with pytest.raises(FileError, match="another text"):
        started(whole[3], job={"text": "two"})


@pytest.mark.parametrize(("minutes", "steps"), [(0.5 / 60, 0), (2.5 / 60, 0), (4.5 / 60, 1)])
def test_less_time_than_a_step_and_its_checks_take_is_said_at_once(tmp_path, monkeypatch, minutes, steps):
    taken, gradients = [], healing._Healer.gradients
    monkeypatch.setattr(healing._Healer, "gradients", lambda *given: taken.append(1) or gradients(*given))
    with pytest.raises(SenteiError, match="--heal: expected more than .* so that a step and the checks"):
        started(tmp_path, minutes=minutes)
    assert len(taken) == steps


def test_without_text_there_is_nothing_to_learn_from(tmp_path):
    with pytest.raises(SenteiError, match="text that is not used to judge"):
        started(tmp_path, texts(rows=0))


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), float("nan"), "10"])
def test_minutes_are_checked(minutes):
    with pytest.raises(SenteiError, match="minutes as a number above 0"):
        Config(minutes=minutes)


@pytest.mark.parametrize("value", [None, {}, {"spent": 1, "step": 1, "check": 1, "checked": -1},
                                   {"spent": "1", "step": 1, "check": 1, "checked": 1}])
def test_a_checkpoint_without_its_times_is_refused(value):
    with pytest.raises(FileError, match="the times of a healing"):
        Clock.from_json(value)


def test_each_row_is_read_once_an_epoch():
    given = texts(rows=5)
    read = [given.batch(step, 2) for step in range(5)]
    assert sorted(torch.cat(read)[:5].tolist()) == sorted(given.rows.tolist())
    assert sorted(torch.cat(read)[5:].tolist()) == sorted(given.rows.tolist())
