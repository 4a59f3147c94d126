"""A fuzzer for every reader: harmless files are changed at random, and a reader may only read or refuse them.

    python tests/attacks/fuzz.py [SECONDS [READER …]]

SECONDS (60) are shared among the readers, each in a process of its own. With atheris, which goes where the code has not
been yet, else by chance alone. A header or a JSON file is changed as the object it holds, or as bytes. What breaks a
reader is left in a file and told; it belongs into the table then. Exit code 1 says that one was found.
"""

import importlib.util
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

VALUES = (None, True, False, 0, 1, -1, 2, 64, 1 << 31, 1 << 63, 10**30, 1e308, -1e308, 0.5, "", "a", "\x00", "../a",
          "/", "\U0001f600", "__class__", "\ud800", [], {}, [[]], [0, 0], {"a": 1}, [None], "9" * 30)
SIZES = (0, 1, 7, 8, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)
LONGEST = 1 << 16
DRIVEN = "--reader"  # a process for one reader


def mutated(value: object, draw: random.Random, keys: list[str]) -> object:
    """A JSON value with one place changed."""
    inside = isinstance(value, dict | list) and len(value) > 0 and draw.random() < 0.85
    if not inside:
        number = isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.5
        return value + draw.choice((1, -1, 8, -8)) if number else draw.choice(VALUES)
    if isinstance(value, list):
        place, copied = draw.randrange(len(value)), list(value)
        how = draw.random()
        if how < 0.1:
            del copied[place]
        elif how < 0.2:
            copied.insert(place, copied[draw.randrange(len(value))])
        else:
            copied[place] = mutated(value[place], draw, keys)
        return copied
    name, copied = draw.choice(list(value)), dict(value)
    how = draw.random()
    if how < 0.1:
        del copied[name]
    elif how < 0.2:
        copied[draw.choice(keys)] = draw.choice([*value.values(), *VALUES])
    else:
        copied[name] = mutated(value[name], draw, keys)
    return copied


def names_in(value: object) -> list[str]:
    """All keys of a JSON value, and some that are none."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = list(value) if isinstance(value, dict) else []
    return own + [name for item in inner for name in names_in(item) if isinstance(item, dict | list)] + ["", "a"]


def as_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes with a few changed, cut, doubled, or a size that lies."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(content) + 1)
        how = draw.randrange(5)
        if how == 0:
            content[place:place + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            content[place:place + 8] = struct.pack("<Q", draw.choice(SIZES))
        elif how == 2:
            content[place:place + 4] = struct.pack("<I", draw.choice(SIZES) & 0xFFFFFFFF)
        elif how == 3:
            del content[place:place + draw.choice((1, 4, 8, 100))]
        else:
            content[place:place] = content[place:place + draw.choice((1, 8, 100))]
    return bytes(content)


def as_json(data: bytes, draw: random.Random) -> bytes:
    """A JSON file with a place changed."""
    value = json.loads(data)
    return json.dumps(mutated(value, draw, names_in(value))).encode()


def as_safetensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with a place of its header changed, or of the JSON in its metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    about = header.get("__metadata__") or {}
    key = next((key for key, text in about.items() if text.startswith("{")), None)
    if key is not None and draw.random() < 0.7:
        inner = json.loads(about[key])
        about[key] = json.dumps(mutated(inner, draw, names_in(inner)))
    else:
        header = mutated(header, draw, names_in(header))
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + size:]


def change(data: bytes, seed: int, how: Callable) -> bytes:
    """The data changed as `how`, or as bytes where it is none of that kind or by chance."""
    draw = random.Random(seed)
    try:
        return how(data, draw) if draw.random() < 0.8 else as_bytes(data, draw)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error):
        return as_bytes(data, draw)


def readers() -> dict[str, tuple]:
    """By name the door whose harmless file is changed, the file in it, how, and what reads it."""
    from attacks import on_runs, on_settings, on_training, on_weights
    from attacks.door import Door

    from sentei.conversion import adapter_files, adapter_header, export, gguf_header, gguf_weights, inspection
    from sentei.conversion.families import family_of
    from sentei.conversion.model_folder import check_side_files, read_config, weight_files
    from sentei.conversion.plan import Plan
    from sentei.conversion.tokenizers import read_tokenizer

    def gguf(path: Path) -> None:
        family_of(gguf_weights.settings(path, gguf_header.read_header(path)), str(path))

    def adapter(path: Path) -> None:
        adapter_files.read_settings(path)
        adapter_header.read_factors(path)

    def looked(path: Path) -> None:
        _, refused = inspection.inspect(path)
        if refused is not None:
            raise refused

    def row(door: Door, name: str | None, how: Callable, read: Callable) -> tuple:
        return door.make, name, how, read

    return {
        "safetensors": row(on_weights.SAFETENSORS, "model.safetensors", as_safetensors, weight_files),
        "index": row(on_weights.SHARDS, on_weights.INDEX, as_json, weight_files),
        "gguf": row(on_weights.GGUF, None, as_bytes, gguf),
        "config": row(on_settings.CONFIG, "config.json", as_json, read_config),
        "config of transformers": row(on_settings.CONFIG, "config.json", as_json, on_weights.open_model),
        "side files": row(on_settings.TOKENIZER, "tokenizer_config.json", as_json, check_side_files),
        "tokenizer": row(on_settings.TOKENIZER, "tokenizer.json", as_json, read_tokenizer),
        "adapter": row(on_settings.ADAPTER, "adapter_config.json", as_json, adapter),
        "adapter weights": row(on_settings.ADAPTER, "adapter_model.safetensors", as_safetensors,
                               on_settings.open_adapter),
        "policy": row(on_settings.POLICY, "sentei.json", as_json,
                      lambda path: Plan.from_json(export.read_policy(path)["plan"])),
        "receipt": row(on_settings.POLICY, "receipt.safetensors", as_safetensors, export.read_receipt),
        "yaml": row(on_training.YAML, None, as_bytes, on_training.open_yaml),
        "manifest": row(on_training.CHECKPOINT, "checkpoint-00000002.json", as_json, on_training.open_checkpoint),
        "trained": row(on_training.TRAINED, "config.json", as_json, on_training.TRAINED.open),
        "tokens": row(on_training.TOKENS, None, as_safetensors, on_training.open_tokens),
        "trace": row(on_runs.TRACE, None, as_safetensors, on_runs.open_trace),
        "inspect": row(on_weights.SHARDS, on_weights.INDEX, as_json, looked),
        "inspect gguf": row(on_weights.GGUF, None, as_bytes, looked),
    }


def target(name: str, folder: Path) -> tuple[bytes, Callable, Callable[[bytes], None]]:
    """The harmless bytes, how they are changed, and what is done with others."""
    from sentei.core.errors import SenteiError

    make, member, how, read = readers()[name]
    path = make(folder)
    file = path / member if member else path
    harmless = file.read_bytes()
    read(path)  # or the fuzzer would see refusals alone

    def one(data: bytes) -> None:
        file.write_bytes(data)
        try:
            read(path)
        except SenteiError as error:
            if error.exit_code not in (3, 4, 5):
                raise
            error.lines().encode("utf-8")

    return harmless, how, one


def drive(name: str, seconds: float, left: Path) -> None:
    """Fuzzes one reader in this process; what breaks it is left in the folder `left`."""
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("atheris"):
            by_coverage(name, seconds, left, Path(folder))
        harmless, how, one = target(name, Path(folder) / "files")
        end, seed, data = time.monotonic() + seconds, 0, harmless
        while time.monotonic() < end:
            data, seed = change(harmless if seed % 4 == 0 else data, seed, how)[:LONGEST], seed + 1
            (left / name).write_bytes(data)  # a crash or a hang leaves it there
            one(data)
        (left / name).unlink(missing_ok=True)
        print(f"{name}: {seed} tries by chance")


def by_coverage(name: str, seconds: float, left: Path, folder: Path) -> None:
    """The same with atheris; does not return."""
    import atheris

    with atheris.instrument_imports(include=["sentei"], enable_loader_override=False):
        harmless, how, one = target(name, folder / "files")
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "harmless").write_bytes(harmless)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        return change(data or harmless, seed, how)[:longest]

    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={max(1, round(seconds))}", "-timeout=10", "-seed=1",
                   "-rss_limit_mb=3000", f"-max_len={max(LONGEST, 2 * len(harmless))}",
                   f"-artifact_prefix={left / name}-", "-print_final_stats=1", "-verbosity=0"], one,
                  custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Fuzzes the readers that are named, or all, and tells what was found."""
    if sys.argv[1:2] == [DRIVEN]:
        drive(sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
        return 0
    seconds, names = float((sys.argv[1:] or [60])[0]), sys.argv[2:] or list(readers())
    left = Path(tempfile.mkdtemp(prefix="found-"))
    for name in names:
        words = [sys.executable, __file__, DRIVEN, name, str(seconds / len(names)), str(left)]
        ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds + 600)
        tries = [line for line in (ran.stdout + ran.stderr).splitlines() if "tries" in line or "executed_units" in line]
        state = "sound" if ran.returncode == 0 else "BROKEN"
        print(f"{name}: {state}, {' '.join(tries[-1:]) or 'no tries'}", flush=True)
        if ran.returncode:
            print(ran.stderr[-4000:], file=sys.stderr)
    found = sorted(left.iterdir())
    print(f"{len(found)} found" + "".join(f"\n{path}" for path in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
