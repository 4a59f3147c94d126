"""Runs of the command line that are killed, or find the disk full, at every change of their folder; and go on.

    python tests/cut_off.py {prune,train,trace} {kill,full} FOLDER STRIDE

One process loads everything and forks for each run. An audit hook of the interpreter counts what changes the folder:
files opened to be written, renamed, removed, folders made. At the n-th the run kills itself (SIGKILL), or everything
that would need room on the disk fails from there on. Then what is left is looked at, and the same command runs again,
undisturbed. Prints a JSON object for each n: how both ended, what was wrong with what was left, and with the result.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
ROOM = {"os.rename", "os.mkdir", "os.link", "os.symlink"}  # what a full disk may refuse
WEIGHTS = {"prune": ("model.safetensors", "config.json", "tokenizer.json"),
           "train": ("model.safetensors", "config.json"), "trace": ()}
RESULT = {"prune": {"model.safetensors", "sentei.json", "sentei-receipt.json", "report.html", "README.md"},
          "train": {"model.safetensors", "config.json", "loss.svg", "metrics.jsonl"},
          "trace": {"page.html", "run.trace"}}


def subject(folder: Path) -> Path:
    """A tiny model, a text and a job for `sentei train`."""
    from tiny import save_tiny

    save_tiny(folder / "tiny", "llama")
    (folder / "text.txt").write_text(" ".join(f"{number} squared is {number * number}." for number in range(3000)))
    (folder / "job.yaml").write_text(
        "model: {width: 16, layers: 1, heads: [2, 2], feed_forward: 32}\n"
        "data: {text: [text.txt], context: 16, held_out: 2}\n"
        "training: {steps: 6, batch: 2, evaluate: 3, save: 2}\n")
    return folder


def words(job: str, given: Path, out: Path) -> list[str]:
    """The command line of a job that writes `out`."""
    return {"prune": ["prune", given / "tiny", "--text", given / "text.txt", "--workload", "prefill:256", "--quality",
                      "0.5", "--out", out],
            "train": ["train", given / "job.yaml", "--out", out],
            "trace": ["trace", given / "tiny", "one two", "--out", out / "page.html", "--save", out / "run.trace"]}[job]


def quickened() -> None:
    """Leaves out what takes seconds and writes nothing of its own: a fresh process, plots, and who is faster."""
    from sentei.conversion import export
    from sentei.measurement import report
    from sentei.measurement.latency import Comparison

    export.check_afresh = export.check
    report.write_plots = lambda *_: []
    Comparison.ratios = lambda _: [2.0]


def changing(out: Path, at: int | None, fault: str) -> list[str]:
    """Counts the changes of this process to `out`, in the list returned; the one of number `at` brings the fault."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (opened or event in CHANGES) or not any(str(part).startswith(str(out)) for part in arguments[:2]):
            return
        seen.append(f"{event} {arguments[0]}")
        if at is None or len(seen) <= at:
            return
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif opened or event in ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)
    return seen


def forked(work: Callable[[], dict]) -> dict:
    """What `work` returned in a fork of this process; {"killed": True} when it was."""
    into, out = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = json.dumps(work()).encode()
            with open(out, "wb") as stream:
                stream.write(told)
        finally:
            os._exit(0)
    os.close(out)
    with open(into, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": True} if killed else json.loads(told or "{}")


def run(job: str, given: Path, out: Path, at: int | None, fault: str) -> dict:
    """Runs a job in this process, which is at its end then."""
    from sentei import cli

    os.chdir(given)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the result
    seen, said = changing(out, at, fault), io.StringIO()
    sys.argv = ["sentei", *map(str, words(job, given, out))]
    with contextlib.redirect_stderr(said):
        code = cli.main()
    return {"code": code, "changes": len(seen), "words": said.getvalue()[-1500:]}


def digests(out: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The SHA-256 of those files that are there."""
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names if (out / name).is_file()}


def wrong_with(job: str, out: Path, whole: dict[str, str]) -> list[str]:
    """What is half, of what a run left that was cut off, and could be taken for whole."""
    from sentei.conversion import export
    from sentei.core.errors import SenteiError
    from sentei.core.safetensors_header import read_header
    from sentei.core.storage import read_json
    from sentei.training import checkpoints

    wrong = []
    named = [path for path in out.rglob("*") if path.is_file() and not any(
        part.startswith(".") or part == "unfinished-checkpoint" for part in path.relative_to(out).parts)]
    for path in named:
        try:
            if path.suffix == ".json":
                read_json(path)
            if path.suffix in (".safetensors", ".trace"):
                read_header(path)
        except SenteiError as error:
            wrong.append(str(error))
    if (out / export.POLICY).is_file() and digests(out, WEIGHTS[job]) != whole:
        wrong.append("a policy beside other weights")
    if (out / "README.md").is_file() and not (out / export.POLICY).is_file():
        wrong.append("a card without a policy")
    if any(path.suffix == ".html" and "</html>" not in path.read_text() for path in named):
        wrong.append("half a page")
    try:
        checkpoints.newest(out)
    except SenteiError as error:
        wrong.append(str(error))
    return wrong


def main() -> None:
    """Cuts runs of a job off at every STRIDE-th change."""
    job, fault, folder, stride = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), int(sys.argv[4])
    os.environ.update(HOME=str(folder / "home"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    given = subject(folder)
    quickened()
    whole = folder / "whole"
    first = forked(lambda: run(job, given, whole, None, fault))
    print(json.dumps({"at": None, "first": first, "missing": sorted(RESULT[job] - set(os.listdir(whole)))}), flush=True)
    expected = digests(whole, WEIGHTS[job])
    for at in range(0, first["changes"], stride):
        out = folder / "out"
        done = forked(lambda at=at, out=out: run(job, given, out, at, fault))
        left = wrong_with(job, out, expected) if out.exists() else []
        again = forked(lambda out=out: run(job, given, out, None, fault))
        unfinished = [str(path.relative_to(out)) for path in out.rglob("*")
                      if path.name.startswith(".") and path.name != ".lock" and job != "trace"]
        print(json.dumps({"at": at, "first": done, "wrong": left, "again": again, "unfinished": unfinished,
                          "missing": sorted(RESULT[job] - set(os.listdir(out))),
                          "same": digests(out, WEIGHTS[job]) == expected}), flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
