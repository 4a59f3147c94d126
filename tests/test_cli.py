"""The command line as a user meets it: real processes, with a stand-in for the pipeline behind them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from terminal import four_parts

from sentei import cli

ROOT = Path(cli.__file__).parents[1]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "matplotlib", "tqdm", "accelerate", "gguf"}
FLAGS = {
    "prune": {"MODEL", "--text", "--workload", "--quality", "--speed", "--no-lookahead", "--dtype", "--heal", "--out",
              "--plain", "--online", "--json"},
    "slack": {"MODEL", "--text", "--workload", "--dtype", "--online", "--json"},
    "verify": {"DIR", "--json"},
    "bench": {"NAME", "CASE", "--runs", "--json"},
    "train": {"CONFIG", "--out", "--json"},
    "trace": {"MODEL", "PROMPT", "--control", "--out", "--save", "--mass", "--write", "--online", "--json"},
    "inspect": {"FILE", "--json"},
    "lab": {"NAME", "--out", "--json"},
}

# Python runs a file of this name at its start: here it puts the stand-in where the pipeline would be.
STAND_IN = '''
import sys, types

def outcome(met=True, **more):
    side = {"perplexity": 12.5, "seconds": 4.0, "tokens_per_second": 1024.0}
    result = {"schema": "sentei.prune/1", "model": "tiny", "workload": "prefill:64", "dtype": "float32", "threads": 2,
              "dense": side, "pruned": {**side, "seconds": 3.2}, "speedup": 1.25, "quality": 0.9912, "density": 0.4,
              "plan": [], "does": ["attention computes 40 % of its connections"], "frontier": [],
              "out": "a folder", **more}
    return types.SimpleNamespace(result=result, met=met, reason="no plan reaches 0.99", report="a folder/report.html",
                                 quality_interval=(0.9901, 0.9923))

def run(request, progress):
    import ctypes, errno, os, subprocess, time
    from sentei.core import errors
    BODY

def verify(folder):
    return {"schema": "sentei.verify/1", "met": folder.name == "good", "out": str(folder), "checks": []}

pipeline = types.ModuleType("sentei.pipeline")
pipeline.Request, pipeline.run, pipeline.verify = types.SimpleNamespace, run, verify
sys.modules["sentei.pipeline"] = pipeline
'''


@pytest.fixture
def sentei(tmp_path):
    """Starts `python -m sentei ARGUMENTS` whose job is `body`; returns the process, finished unless wait=False."""

    def start(*arguments, body="return outcome()", python=(), wait=True, **options):
        (tmp_path / "sitecustomize.py").write_text(STAND_IN.replace("BODY", body.replace("\n", "\n    ")))
        process = subprocess.Popen(
            [sys.executable, *python, "-m", "sentei", *arguments], text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "COLUMNS": "120", "PYTHONUNBUFFERED": ""},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
        if not wait:
            return process
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return start


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in cli.VERBS)],
                         ids=" ".join)
def test_help_imports_nothing_heavy(sentei, arguments):
    done = sentei(*arguments, python=["-X", "importtime"])
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0 and "sentei" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in cli.VERBS)], ids=" ".join)
def test_help_shows_examples_and_every_exit_code(sentei, arguments):
    text = sentei(*arguments).stdout
    assert re.search(r"^examples:\n  sentei ", text, re.MULTILINE)
    codes = re.findall(r"^  (\d+) +\w", text.split("exit codes:\n")[1], re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "4", "5", "70", "130"]


def test_version_is_the_package_s(sentei):
    written = re.search(r'^__version__ = "(.+)"', (ROOT / "sentei" / "__init__.py").read_text(), re.MULTILINE)[1]
    assert sentei("--version").stdout == f"sentei {written}\n"


def test_flags_are_frozen():
    """A new flag is a promise for years: it is added to this list on purpose or not at all."""
    found = {}
    for name, verb in cli.VERBS.items():
        parser = cli.Parser(prog="")
        verb.arguments(parser)
        usage = re.sub(r"(--[a-z]+) [^]|]+", r"\1", parser.format_usage().removeprefix("usage:"))
        found[name] = set(re.findall(r"--[a-z-]+|[A-Z]+", usage))
    assert found == FLAGS


@pytest.mark.parametrize(("arguments", "where", "got", "do"), [
    ([], "sentei", "none", "run sentei --help"),
    (["prun"], "sentei", "'prun'", "did you mean sentei prune?"),
    (["zzz"], "sentei", "'zzz'", "run sentei --help"),
    (["--verbose"], "sentei", "the following arguments are required: VERB", "run sentei --help"),
    (["prune", "--onl"], "sentei", "unrecognized arguments: --onl", "run sentei --help"),
    (["prune", "--quality", "0"], "--quality", "'0'", None),
    (["prune", "--quality", "nan"], "--quality", "'nan'", None),
    (["prune", "--quality", "good"], "--quality", "'good'", None),
    (["prune", "--quality", ""], "--quality", "''", None),
    (["prune", "--speed", "0.99"], "--speed", "'0.99'", None),
    (["prune", "--speed", "inf"], "--speed", "'inf'", None),
    (["prune", "--speed", "2", "--quality", "0.9"], "sentei prune",
     "argument --quality: not allowed with argument --speed", "run sentei prune --help"),
    (["prune", "--dtype", "float16"], "sentei prune",
     "argument --dtype: invalid choice: 'float16' (choose from 'float32', 'bfloat16')", "run sentei prune --help"),
    *(([verb, *needed, flag, ""], flag, "''", f"name one, or leave {flag} away") for verb, needed, flag in (
        ("prune", (), "--out"), ("train", ("c.yaml",), "--out"), ("trace", ("m", "a"), "--out"),
        ("trace", ("m", "a"), "--save"), ("lab", ("snr",), "--out"))),
    (["trace", "m", "a", "--out="], "--out", "''", "name one, or leave --out away"),
    (["verify"], "sentei verify", "the following arguments are required: DIR", "run sentei verify --help"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_usage_errors_have_four_parts(sentei, arguments, where, got, do):
    done = sentei(*arguments)
    parts = four_parts(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    assert (parts["error"], parts["got"]) == (where, got)
    assert parts["do this"] == (do or "correct the number and run the command again")


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], {"model": None, "text": None, "workload": "prefill:4096", "quality": "0.99", "speed": None,
          "dtype": "float32", "out": None, "online": False, "lookahead": True, "plain": False}),
    (["m.gguf", "--speed", "1.5", "--text", "a.txt"], {"model": "m.gguf", "quality": None, "speed": "1.5",
                                                       "text": "a.txt"}),
    (["--plain"], {"plain": True, "quality": "0.99"}),
    (["--quality", "1", "--dtype", "bfloat16", "--out", "o", "--online", "--workload", "prefill:8000",
      "--no-lookahead"], {"quality": "1.0", "speed": None, "dtype": "bfloat16", "out": "o", "online": True,
                          "workload": "prefill:8000", "lookahead": False}),
], ids=["defaults", "speed", "plain", "quality"])
def test_arguments_reach_the_request(sentei, arguments, expected):
    body = "assert not isinstance(request.out, str) and not isinstance(request.text, str)\n" \
           "told = {k: v if v is None or v is True or v is False else str(v) for k, v in vars(request).items()}\n" \
           "return outcome(told=told)"
    done = sentei("prune", *arguments, "--json", body=body)
    told = json.loads(done.stdout)["told"]
    assert {key: told[key] for key in expected} == expected
    assert set(told) == {"model", "text", "workload", "quality", "speed", "dtype", "out", "online", "lookahead", "heal",
                         "plain"}


NOISE = """
ctypes.CDLL(None).printf(b"native, held until the exit\\n")
print("print")
os.write(1, b"write\\n")
subprocess.run(["echo", "child"])
"""
NOISES = "print\nwrite\nchild\nnative, held until the exit\n"


def test_json_is_all_of_stdout_however_noisy_the_libraries(sentei):
    done = sentei("prune", "--json", body=NOISE + "return outcome()")
    assert json.loads(done.stdout)["schema"] == "sentei.prune/1" and done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, NOISES)


def test_summary_is_all_of_stdout_and_says_how_to_use_the_result(sentei):
    done = sentei("prune", body=NOISE + "return outcome(out='it\\'s \"here\"')")
    lines = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert list(lines) == ["model", "workload", "speed-up", "quality", "plan", "report", "use it"]
    assert lines["workload"] == "prefill:64, float32, 2 threads"
    assert lines["speed-up"] == "1.25 times (4 s dense, 3.2 s pruned; 1.02e+03 and 1.02e+03 tokens a second)"
    assert lines["quality"] == "0.9912, between 0.9901 and 0.9923 (perplexity 12.5 dense, 12.5 pruned)"
    assert lines["report"] == "a folder/report.html"
    assert eval(lines["use it"].removeprefix("import sentei; model = sentei.load(")[:-1]) == "it's \"here\""


def test_summary_tells_what_was_proved_beside_the_plan_and_nothing_that_was_only_foreseen(sentei):
    points = [{"rooms": rooms, "speedup": speedup, "quality": 0.5, "speed": speed, "chosen": chosen}
              for rooms, speedup, speed, chosen in ((["depth"], 1.1, "measured", False), (["a"], 9.0, "measured", True),
                                                    ([], 1.0, "measured", False), (["b"], 8.0, "foreseen", False),
                                                    (["depth", "weights"], 1.2, "measured", False))]
    done = sentei("prune", body=f"return outcome(frontier={points})")
    lines = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert lines["beside it"] == ("depth and weights 1.20 times at 0.5000, measured; depth 1.10 times at 0.5000, "
                                  "measured; no room 1.00 times at 0.5000, measured")


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["summary", "json"])
def test_bound_not_met_prints_the_best_plan_and_the_reason(sentei, flags):
    done = sentei("prune", *flags, body="return outcome(met=False)")
    assert done.returncode == 1
    assert done.stderr == "sentei: bound not met: no plan reaches 0.99\n"
    assert json.loads(done.stdout)["quality"] == 0.9912 if flags else "0.9912" in done.stdout


def test_a_result_that_is_no_json_is_refused(sentei):
    done = sentei("prune", "--json", body="return outcome(quality=float('nan'))")
    assert (done.returncode, done.stdout) == (70, "")


@pytest.mark.parametrize(("raised", "code", "where", "got"), [
    ("errors.SenteiError('--workload', expected='e', got='g', do='d')", 2, "--workload", "g"),
    ("errors.FileError('here', expected='e', got='g', do='d')", 3, "here", "g"),
    ("errors.ResourceError('here', expected='e', got='g', do='d')", 4, "here", "g"),
    ("errors.UnsupportedError('here', expected='e', got='g', do='d')", 5, "here", "g"),
    ("OSError(errno.ENOSPC, 'No space', 'a/file')", 4, "a/file", "a full disk"),
    ("OSError(errno.EDQUOT, 'Quota')", 4, "the disk", "a full disk"),
    ("RuntimeError('I/O error: No space left on device (os error 28)')", 4, "the disk", "a full disk"),
    ("MemoryError()", 4, "memory", "none left"),
    ("RuntimeError('CUDA out of memory')", 4, "memory", "CUDA out of memory"),
    ("RuntimeError(\"DefaultCPUAllocator: can't allocate memory\")", 4, "memory",
     "DefaultCPUAllocator: can't allocate memory"),
], ids=lambda value: value.split("(")[0].removeprefix("errors.") if isinstance(value, str) else str(value))
def test_errors_have_four_parts_and_their_exit_code(sentei, raised, code, where, got):
    done = sentei("prune", "--json", body=f"raise {raised}")
    parts = four_parts(done.stderr)
    assert (done.returncode, done.stdout) == (code, "")
    assert (parts["error"], parts["got"]) == (where, got)


@pytest.mark.parametrize("raised", ["ZeroDivisionError('odd')", "RuntimeError('odd')", "OSError(errno.EIO, 'odd')"])
def test_an_unforeseen_error_shows_its_traceback_and_exits_70(sentei, raised):
    done = sentei("prune", "--out", "my out", body=f"raise {raised}")
    assert (done.returncode, done.stdout) == (70, "")
    assert "Traceback" in done.stderr and "odd" in done.stderr and "please report it" in done.stderr
    assert done.stderr.endswith("-m sentei prune --out 'my out'\n")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_interrupted_says_how_to_go_on(sentei, sent):
    body = "print('working', file=sys.stderr, flush=True)\ntime.sleep(60)"
    process = sentei("prune", "--out", "my out", "--json", body=body, wait=False)
    assert process.stderr.readline() == "working\n"
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted: run the same command again to go on from the last finished stage" in stderr
    assert stderr.endswith(f"{sys.executable} -m sentei prune --out 'my out' --json\n")


def test_the_command_shown_for_the_installed_script_is_the_one_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/bin/sentei", "prune", "--out", "my out"])
    assert cli.command() == "/some/bin/sentei prune --out 'my out'"


STAGES = """
for name, total in (("load", 1), ("calibrate", 3)):
    with progress.stage(name, total) as step:
        for number in range(total):
            step(f"part {number}")
return outcome()
"""


def test_progress_off_a_terminal_is_one_plain_line_a_stage(sentei):
    done = sentei("prune", "--json", body=STAGES)
    assert re.fullmatch(r"\[ +\d+ s\] load\n\[ +\d+ s\] calibrate \(3 steps\)\n", done.stderr)
    assert json.loads(done.stdout)


def on_a_terminal(sentei, monkeypatch, term, columns=100):
    """What a terminal of kind `term` receives on stderr, and stdout."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", term)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, columns))
    process = sentei("prune", "--json", body=STAGES, wait=False, stderr=theirs)
    os.close(theirs)
    stdout = process.communicate(timeout=60)[0]
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return shown, stdout


def test_progress_on_a_terminal_is_a_bar_a_stage_without_colours(sentei, monkeypatch):
    shown, stdout = on_a_terminal(sentei, monkeypatch, "xterm-256color")
    assert re.search(r"load +: 100%.*1/1", shown) and re.search(r"calibrate +: 100%.*3/3.*part 2", shown)
    assert not re.search(r"\x1b\[[\d;]*m", shown)
    assert json.loads(stdout)


@pytest.mark.parametrize(("term", "columns"), [("dumb", 100), ("xterm", 0)], ids=["dumb", "no columns"])
def test_progress_on_a_terminal_that_cannot_redraw_is_plain(sentei, monkeypatch, term, columns):
    shown, _ = on_a_terminal(sentei, monkeypatch, term, columns)
    assert "%" not in shown and "calibrate (3 steps)" in shown


@pytest.mark.parametrize(("folder", "code"), [("good", 0), ("bad", 1)])
def test_verify_prints_what_was_checked(sentei, folder, code):
    plain, exact = sentei("verify", folder), sentei("verify", folder, "--json")
    assert plain.returncode == exact.returncode == code
    assert json.loads(exact.stdout)["out"] == folder
    assert plain.stdout.splitlines()[1:] == [f"met     {not code}", f"out     {folder}"]
