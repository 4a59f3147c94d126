"""A run that is cut off: what it says, what it keeps, and that the same command finishes it."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import unfinished, watching

import sentei as package
from sentei import cli
from sentei.commands import prune as main_job
from sentei.core.errors import FileError
from sentei.core.storage import LOCK
from sentei.pipeline import MARKER

ROOT = Path(cli.__file__).parents[1]
RESULT = {"config.json", "model.safetensors", "sentei.json", "sentei-receipt.json", "report.html"}
# What is kept, by kind, when a run is stopped at a step of a stage.
DENSE = {"dense-choose", "dense-verify", "seconds"}
STOPS = [
    ("load", 1, set()),
    ("calibrate", 0, set()),
    ("calibrate", 5, {"seconds", "dense-verify"}),
    ("slack", 2, DENSE),
    ("solve", 3, DENSE | {"slack", "offers", "choose"}),
    ("measure", 1, DENSE | {"slack", "offers", "choose"}),
    ("measure", 5, DENSE | {"slack", "offers", "choose", "verify"}),
    ("export", 1, DENSE | {"slack", "offers", "choose", "verify", "time"}),
    ("report", 0, DENSE | {"slack", "offers", "choose", "verify", "time"}),
]


def stamps(out: Path) -> dict[str, int]:
    """When each finished stage was written."""
    return {path.stem: path.stat().st_mtime_ns for path in (out / "stages").glob("*")}


def kinds(stages: dict[str, int]) -> set[str]:
    """The names of stages without the digits that stand for a plan."""
    return {re.sub("-[0-9a-f]{16}$", "", name) for name in stages}


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage, step, kept", STOPS, ids=[f"{stage} {step}" for stage, step, _ in STOPS])
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(prune, tmp_path, monkeypatch, stage, step, kept):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(main_job, "Progress", watching(lambda *at: at == (stage, step) and interrupt()))
        done = prune("--json")
    finished = stamps(out)
    assert (done.returncode, done.stdout) == (130, "")
    assert "interrupted: run the same command again to go on from the last finished" in done.stderr
    assert done.stderr.endswith(f"\n  {shlex.join(sys.argv)}\n")
    assert kinds(finished) == kept and unfinished(out) == []
    assert prune().returncode == 0
    assert stamps(out).items() >= finished.items(), "a finished stage was done again"
    assert RESULT <= set(os.listdir(out)) and unfinished(out) == []


@pytest.mark.parametrize("stage", ["calibrate", "export", "report"])
def test_ctrl_c_while_a_file_is_put_in_its_place_leaves_no_half_file(prune, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(main_job, "Progress", watching(
            lambda name, _: name == stage and patch.setattr(os, "replace", interrupt)))
        assert prune().returncode == 130
    assert unfinished(out) == []
    if stage != "report":
        with pytest.raises(FileError, match="sentei.json"):
            package.load(out)
    assert prune().returncode == 0


def test_with_another_text_nothing_of_the_first_is_kept(prune, tmp_path):
    prune()
    before = stamps(tmp_path / "out")
    text = tmp_path / "other.txt"
    text.write_text("another text " * 200)
    assert prune(text=text).returncode == 0
    after = stamps(tmp_path / "out")
    kept = {name for name in before if after.get(name) == before[name]}
    assert not kinds(kept) & (DENSE | {"slack"})


def test_with_another_workload_nothing_of_the_first_is_kept(prune, tmp_path):
    prune()
    before = stamps(tmp_path / "out")
    assert prune(workload="prefill:128").returncode == 0
    after = stamps(tmp_path / "out")
    kept = {name for name in before if after.get(name) == before[name]}
    assert not kinds(kept) & (DENSE | {"slack"})


@pytest.fixture
def command(subject, tmp_path):
    """The tiny job as a real process, its stderr on a pipe."""
    words = [sys.executable, "-m", "sentei", "prune", subject["model"], "--text", str(subject["text"]), "--workload",
             "prefill:256", "--quality", "0.5", "--out", str(tmp_path / "out")]

    def start() -> subprocess.Popen:
        return subprocess.Popen(words, text=True, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "PYTHONPATH": str(ROOT)})

    return start


def ended_at(process: subprocess.Popen, stage: str, sent: signal.Signals) -> tuple[str, str]:
    """Sends a signal when a stage begins; stdout and the rest of stderr."""
    while f"] {stage}" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(sent)
    return process.communicate(timeout=60)


def test_a_killed_process_leaves_a_folder_that_the_same_command_finishes(command, prune, tmp_path):
    out, process = tmp_path / "out", command()
    ended_at(process, "slack", signal.SIGKILL)
    finished = stamps(out)
    assert process.returncode == -signal.SIGKILL and kinds(finished) >= DENSE
    (out / "stages" / ".slack.json.cut0ff.part").write_text("{")  # what a kill in the middle of a write leaves
    assert prune().returncode == 0
    assert stamps(out).items() >= finished.items() and unfinished(out) == []
    assert RESULT <= set(os.listdir(out))


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, f".{MARKER}.cut0ff.part"]], ids=" ".join)
def test_a_folder_of_a_run_killed_before_it_began_is_taken_up(prune, tmp_path, left):
    (tmp_path / "out").mkdir()
    for name in left:
        (tmp_path / "out" / name).write_text("")
    assert prune().returncode == 0
    assert unfinished(tmp_path / "out") == []


def test_ctrl_c_in_a_real_process_exits_130_and_says_how_to_go_on(command, prune, tmp_path):
    process = command()
    stdout, stderr = ended_at(process, "slack", signal.SIGINT)
    finished = stamps(tmp_path / "out")
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr and stderr.endswith(f"--out {tmp_path / 'out'}\n")
    assert kinds(finished) >= DENSE and unfinished(tmp_path / "out") == []
    assert prune().returncode == 0
    assert stamps(tmp_path / "out").items() >= finished.items()
