"""For every test: no hub, two threads, one seed. For those of the whole job: a tiny job, and the command line."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when transformers is first imported
os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is first imported: its kernels run on the CPU

import signal
import subprocess
import sys

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
# A job in the background of a script is started with SIGINT ignored, and so would be the processes the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in each test, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def choices(tmp_path_factory):
    """What is measured in a test is not remembered beyond the tests."""
    from sentei.kernels import gains

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gains, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> dict:
    """A tiny Llama in a folder and a text long enough for five windows of 512 tokens."""
    from tiny import save_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder, "llama")
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"{number} squared is {number * number}." for number in range(3000)))
    return {"model": str(folder), "text": text, "workload": "prefill:512"}


@pytest.fixture
def sentei(monkeypatch, capfd):
    """Runs `sentei ARGUMENTS` through `main` in this process; returns its exit code, stdout and stderr."""
    from sentei import cli

    def run(*arguments) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["sentei", *map(str, arguments)])
        # What main takes for good, because it expects to be the last thing its process does.
        handler, stdout, own = signal.getsignal(signal.SIGTERM), sys.stdout, os.dup(1)
        try:
            code = cli.main()
        finally:
            os.dup2(own, 1)
            os.close(own)
            sys.stdout = stdout
            signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


@pytest.fixture
def prune(sentei, subject, tmp_path, monkeypatch):
    """`sentei prune` of the tiny job into `out`, with changes to its arguments; without the parts that take seconds.

    The receipt is compared in this process, the plots are not drawn, and the pruned model counts as twice as fast.
    """
    from sentei.conversion import export
    from sentei.measurement.latency import Comparison

    monkeypatch.setattr(export, "check_afresh", export.check)
    monkeypatch.setattr("sentei.measurement.report.write_plots", lambda *_: [])
    monkeypatch.setattr(Comparison, "ratios", lambda _: [2.0])

    def run(*flags: str, **changes) -> subprocess.CompletedProcess:
        job = {"model": subject["model"], "text": subject["text"], "workload": "prefill:256", "quality": 0.5,
               "out": tmp_path / "out"} | changes
        return sentei("prune", job.pop("model"), *flags,
                      *(word for flag, value in job.items() for word in (f"--{flag}", value)))

    return run
