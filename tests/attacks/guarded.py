"""Every attack and every twin of it, each in a process of its own that is watched; prints a JSON object for each.

    python tests/attacks/guarded.py FOLDER [--some] [--inspect] [DOOR …]

With --some, of the attacks at each door every sixteenth, and no file above a megabyte; with --inspect, all are opened
by `sentei inspect` instead.

A process that has loaded everything opens the harmless files once, and then forks for each case: what is measured is
what the case costs beyond the start, and a crash ends one case. An audit hook of the interpreter notes what is run,
reached and written; what native code writes is seen in the folder, which holds the case, the home and all else.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

SHARE, SMALL = 16, 1 << 20
PATIENCE = 30  # seconds until a case is ended: for those that wait for something
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
          "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.rmtree", "shutil.copyfile", "shutil.move"}
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn",
        "socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "webbrowser.open"}


def watch(seen: list[str], folder: str) -> None:
    """Notes in `seen` what the interpreter runs, reaches or writes from now on."""
    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not str(path).startswith(("/dev/", "/proc/")):
                seen.append(f"writes {path}")
        elif event in WRITES:
            seen.append(f"writes by {event} {arguments[0]}")
        elif event in RUNS:
            seen.append(f"runs {event} {arguments[:2]}")
        elif event in ("compile", "exec"):
            name = str(arguments[1] if event == "compile" else getattr(arguments[0], "co_filename", ""))
            if name.startswith(folder) or "template" in name:
                seen.append(f"runs {event} {name}")

    sys.addaudithook(hook)


def memory() -> tuple[int, int]:
    """Megabytes of this process: now, and at most since the last call with `reset`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) >> 10 for name in ("VmRSS", "VmHWM"))


def attempt(open_door, path: Path, folder: Path, out: int) -> None:
    """Opens `path` in this process, tells on `out` how it ended and ends the process."""
    import torch

    from sentei.cli import Ending

    torch.set_num_threads(1)  # makes torch's pool anew after the fork; left to threads that load, they race for it
    seen: list[str] = []
    words = io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, _ = memory()
    start, spent = time.monotonic(), time.process_time()
    watch(seen, str(folder))
    with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words), Ending() as ending:
        open_door(path)
    told = {"code": ending.code, "cpu": time.process_time() - spent, "wall": time.monotonic() - start,
            "megabytes": memory()[1] - before, "seen": seen[:20], "words": words.getvalue()[-3000:]}
    os.write(out, json.dumps(told).encode())
    os._exit(0)


def forked(open_door, path: Path, folder: Path) -> dict:
    """What came of opening `path` in a fork of this process."""
    into, out = os.pipe()
    child = os.fork()
    if not child:
        os.close(into)
        try:
            attempt(open_door, path, folder, out)
        finally:
            os._exit(1)
    os.close(out)
    # Looked at in turns, and not by a clock, which goes on while a machine that is shared stops this process.
    if not any(select.select([into], [], [], 0.1)[0] for _ in range(10 * PATIENCE)):
        os.kill(child, signal.SIGKILL)
    with open(into, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    return json.loads(told) if told else {"code": -1, "words": f"ended by status {status}", "cpu": 0.0, "wall": 0.0,
                                          "megabytes": 0, "seen": []}


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: by path the kind, size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(folder))] = about.st_mode, about.st_size, about.st_mtime_ns
    return found


def inspected(path: Path) -> None:
    """What `sentei inspect` does."""
    from sentei.commands.inspect import VERB

    VERB.work(argparse.Namespace(path=str(path), json=False), lambda result, text: print(json.dumps(result), text))


def largest(folder: Path) -> int:
    """The bytes of the largest file below a folder."""
    return max((size for mode, size, _ in listing(folder).values() if stat.S_ISREG(mode)), default=0)


def main() -> None:
    """Does all cases of the doors named, or of all."""
    folder = Path(sys.argv[1]).resolve()
    for name in ("home", "work", "temporary"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "temporary"), HF_HUB_OFFLINE="1",
                      TOKENIZERS_PARALLELISM="false")
    os.chdir(folder / "work")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch
    from attacks.table import DOORS

    torch.set_num_threads(1)
    some, look = "--some" in sys.argv, "--inspect" in sys.argv
    names = [name for name in sys.argv[2:] if not name.startswith("--")]
    for door in DOORS:
        if names and door.name not in names:
            continue
        harmless, place = folder / "harmless" / door.name, folder / "case"
        target = door.make(harmless).relative_to(harmless)
        door.open(harmless / target)
        for kind, cases in (("twin", door.twins), ("attack", door.attacks)):
            for name, spoil in list(cases.items())[::SHARE if some and kind == "attack" else 1]:
                shutil.copytree(harmless, place, symlinks=True)
                path = spoil(place / target) or place / target
                if some and largest(place) > SMALL:
                    shutil.rmtree(place)
                    continue
                before = listing(folder)
                told = forked(inspected if look else door.open, path, folder)
                changed = sorted(item for item, _ in before.items() ^ listing(folder).items())
                about = {"door": door.name, "kind": kind, "name": name, "changed": changed}
                print(json.dumps(about | told), flush=True)
                shutil.rmtree(place)


if __name__ == "__main__":
    main()
