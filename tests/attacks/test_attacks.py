"""Every attack of the table is refused with exit code 3, quickly, in little memory, and nothing is run or written.

Its twins are let in, so that a door that refuses everything fails too.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = Path(__file__).parent / "guarded.py"
REFUSED = 3
SECONDS, MEGABYTES = 2.0, 300  # of one core; beyond a process that has loaded torch and transformers
# A GGUF file is unpacked in the cache, where an empty lock is left when its vocabulary is refused.
LOCKS = re.compile(r"home/cache(/\.[0-9a-f]{32}\.lock)?")
RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def results(folder: Path, *flags: str, script: str = GUARDED.name) -> list[dict]:
    """What came of all cases, from a process of its own."""
    ran = subprocess.run([sys.executable, str(GUARDED.with_name(script)), str(folder), *flags], capture_output=True,
                         text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def wrong_of(case: dict) -> list[str]:
    """What is wrong with how a case ended."""
    written = case["changed"] + [seen for seen in case["seen"] if seen.startswith("writes")]
    if case["door"] == "GGUF":
        written = [item for item in case["changed"] if not LOCKS.fullmatch(item)]
    checks = {f"ended with {case['code']}": case["code"] != (REFUSED if case["kind"] == "attack" else 0),
              f"took {case['cpu']:.1f} s": case["cpu"] > SECONDS,
              f"took {case['megabytes']} MB": case["megabytes"] > MEGABYTES,
              f"ran {case['seen']}": any(seen.startswith("runs") for seen in case["seen"]),
              f"wrote {written}": bool(written) and case["kind"] == "attack",
              "printed control characters": bool(RAW.search(case["words"]))}
    return [f"{case['door']}: {case['name']} {what}: {case['words'][-300:]}" for what, holds in checks.items() if holds]


def check(cases: list[dict]) -> None:
    """Raises AssertionError with all that is wrong, and unless there are attacks and twins at every door."""
    assert [line for case in cases for line in wrong_of(case)] == []
    for door in {case["door"] for case in cases}:
        assert {case["kind"] for case in cases if case["door"] == door} == {"attack", "twin"}, door


def test_some_attacks_are_refused_and_their_twins_are_not(tmp_path):
    cases = results(tmp_path, "--some")
    check(cases)
    assert len(cases) > 80 and len({case["door"] for case in cases}) == 15


@pytest.mark.slow
def test_all_attacks_are_refused_and_their_twins_are_not(tmp_path):
    cases = results(tmp_path)
    check(cases)
    assert len(cases) > 480 and len({case["door"] for case in cases}) == 15


@pytest.mark.slow
def test_without_its_guard_each_attack_goes_through(tmp_path):
    cases = results(tmp_path, script="unguarded.py")
    assert len(cases) > 20
    assert [f"{case['guard']}: {case['name']}" for case in cases if not wrong_of(case)] == []


@pytest.mark.slow
def test_inspect_looks_at_all_of_them_without_harm(tmp_path):
    """What it cannot see, such as values, it lets pass; what it refuses it refuses with the exit codes of files."""
    cases = results(tmp_path, "--inspect")
    assert {case["code"] for case in cases} <= {0, REFUSED, 5}
    assert [line for case in cases for line in wrong_of(case | {"code": REFUSED, "kind": "attack"})] == []
    seen = {"safetensors", "sharded safetensors", "GGUF", "config.json", "adapter", "sentei.json", "uneven layers",
            "checkpoint", "trace"}
    twins = [case for case in cases if case["kind"] == "twin" and case["door"] in seen]
    assert len(twins) > 20 and [case["name"] for case in twins if case["code"]] == []
    refused = [case["code"] != 0 for case in cases if case["kind"] == "attack" and case["door"] in seen]
    assert sum(refused) > 0.75 * len(refused)


GOOD = {"door": "text", "name": "x", "kind": "attack", "code": 3, "cpu": 0.1, "megabytes": 1, "seen": [], "changed": [],
        "words": ""}


@pytest.mark.parametrize("changes, message", [
    ({"code": 0}, "ended with 0"), ({"code": 70}, "ended with 70"), ({"kind": "twin"}, "ended with 3"),
    ({"cpu": 2.1}, "took 2.1 s"), ({"megabytes": 301}, "took 301 MB"), ({"seen": ["runs os.system"]}, "ran"),
    ({"seen": ["writes /tmp/x"]}, "wrote"), ({"changed": ["case/canary"]}, "wrote"),
    ({"words": "a\x1b[31m"}, "control"), ({"words": "\u202e"}, "control"), ({"changed": ["home/cache"]}, "wrote"),
    ({"door": "GGUF", "changed": ["home/cache/x"]}, "wrote")], ids=str)
def test_what_is_wrong_is_seen(changes, message):
    assert wrong_of(GOOD) == []
    assert len(found := wrong_of(GOOD | changes)) == 1 and message in found[0]


HARM = {
    "a command": ("os.system('true')", "seen", "runs os.system"),
    "a process": ("subprocess.run(['true'])", "seen", "runs subprocess.Popen"),
    "a pickle": ("pickle.loads(b'cposix\\nsystem\\n.')", "seen", "runs pickle.find_class"),
    "a file": ("path.with_name('canary').touch()", "changed", "case/canary"),
    "a connection": ("socket.create_connection(('127.0.0.1', 9))", "seen", "runs socket"),
    "code of the folder": ("exec(compile('1', str(path), 'exec'))", "seen", "runs compile"),
    "a template": ("compile('1', '<template>', 'exec')", "seen", "runs compile <template>"),
    "memory": ("b'x' * (400 << 20)", "megabytes", None),
    "time": ("sum(range(40_000_000))", "cpu", None),
    "a crash": ("os.abort()", "code", None),
    "an error of ours": ("1 / 0", "code", None),
}


@pytest.fixture(scope="module")
def harm(tmp_path_factory) -> dict[str, dict]:
    """What the guard tells of a door that does harm."""
    folder = tmp_path_factory.mktemp("harm")
    code = ("import json, os, pickle, socket, subprocess, sys; from pathlib import Path; import guarded\n"
            f"folder, table = Path({str(folder)!r}), {({name: body for name, (body, *_) in HARM.items()})!r}\n"
            "for name, body in table.items():\n"
            "    path = folder / 'case' / 'file'; path.parent.mkdir(exist_ok=True); path.write_text('')\n"
            "    before = guarded.listing(folder)\n"
            "    told = guarded.forked(eval('lambda path: ' + body), path, folder)\n"
            "    changed = [item for item, _ in before.items() ^ guarded.listing(folder).items()]\n"
            "    print(json.dumps([name, told | {'changed': changed}]), flush=True)\n")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         cwd=GUARDED.parent)
    assert ran.returncode == 0, ran.stderr
    return dict(map(json.loads, ran.stdout.splitlines()))


@pytest.mark.parametrize("name", HARM)
def test_the_guard_sees_harm(harm, name):
    _, where, what = HARM[name]
    told = harm[name][where]
    assert {"megabytes": lambda: told > 300, "cpu": lambda: told > 0.3, "code": lambda: told not in (0, 3),
            "seen": lambda: any(what in item for item in told), "changed": lambda: what in told}[where]()
