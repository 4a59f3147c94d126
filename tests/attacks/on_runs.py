"""Attacks on traces, texts and the folder of a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from attacks.door import Door, as_it_is, bytes_of, cut, headed, header_of, link, raw_header, sparse, text_of
from attacks.on_weights import CANARY, piped
from circuits import observed
from safetensors.torch import save_file

from sentei.circuit import file as trace_file
from sentei.circuit import page
from sentei.core.storage import claimed
from sentei.core.trace_header import KEY
from sentei.measurement.text import read_text
from sentei.training import checkpoints


def trace(folder: Path) -> Path:
    """A trace."""
    folder.mkdir(parents=True)
    trace_file.save(observed(), folder / "run.trace")
    return folder / "run.trace"


def open_trace(path: Path) -> None:
    """What `sentei trace FILE` does; a file that is no trace is a model that is none."""
    if not trace_file.is_trace(path):
        raise checkpoints.FileError(str(path), expected="a trace", got="another file", do="")
    circuit = trace_file.load(path)
    page.render(circuit)
    page.result(circuit)


def told(change: Callable[[dict], object]):
    """Changes the header of a trace."""

    def spoil(header: dict) -> None:
        value = json.loads(header["__metadata__"][KEY])
        change(value)
        header["__metadata__"][KEY] = json.dumps(value)

    return headed(spoil)


def resized(**sizes: int):
    """Other sizes of every layer of the second run, of which no tensors are left."""

    def spoil(path: Path) -> None:
        header, _ = header_of(path)
        value = json.loads(header["__metadata__"][KEY])
        value["runs"][1]["layers"] = [layer | sizes for layer in value["runs"][1]["layers"]]
        kept = {f"0.{name}": tensor for name, tensor in observed().runs[0].tensors.items()}
        save_file(kept, path, metadata={KEY: json.dumps(value)})

    return spoil


def crowded(path: Path) -> None:
    """Two runs of 30,000 tokens and 64 choosers, without a tensor: compared, 57.6 GB for each layer."""
    header, _ = header_of(path)
    value = json.loads(header["__metadata__"][KEY])
    for run in value["runs"]:
        run["tokens"], run["prompt"] = [[0, "a"]] * 30_000, 30_000
        run["layers"] = [layer | {"heads": 64, "kv_heads": 64, "choosers": 64} for layer in run["layers"]]
    save_file({"0.0.cost": torch.zeros(30_000, 2)}, path, metadata={KEY: json.dumps(value)})


def without(part: str):
    """A trace that lacks a part in every layer."""

    def spoil(path: Path) -> None:
        header, _ = header_of(path)
        kept = {name: tensor for name, tensor in trace_file.tensors_of(observed()).items() if not name.endswith(part)}
        save_file(kept, path, metadata=header["__metadata__"])

    return spoil


def spanned(layers: int, choosers: int):
    """Spans of as many rows as there can be, in every layer."""

    def spoil(path: Path) -> None:
        header, _ = header_of(path)
        value = json.loads(header["__metadata__"][KEY])
        run, count = value["runs"][0], 65_534
        run["tokens"], run["prompt"] = [[0, "a"]] * count, count
        run["layers"] = [run["layers"][0] | {"heads": 4, "kv_heads": 4, "choosers": choosers}] * layers
        value["runs"] = [run]
        content = {}
        for layer in range(layers):
            content |= {
                f"0.{layer}.connections.spans": torch.tensor([[0, count, 1, count]], dtype=torch.int32),
                f"0.{layer}.connections.bits": torch.zeros(choosers, count, dtype=torch.uint8),
                f"0.{layer}.connections.ids": torch.zeros(choosers, count, 8, dtype=torch.uint16),
                f"0.{layer}.connections.weights": torch.zeros(choosers, count - 1, 8, dtype=torch.uint8),
            }
        save_file(content, path, metadata={KEY: json.dumps(value)})

    return spoil


FIRST = "0.0.cost"
TRACE = Door(
    name="trace",
    make=trace,
    open=open_trace,
    attacks={
        **{f"cut to {keep}": cut(keep) for keep in (0, 8, 300, -1)},
        **{f"cut to {keep:.0%}": cut(keep) for keep in (0.3, 0.9)},
        "a pickle": bytes_of(CANARY),
        "a header that is no JSON": headed(lambda header: header["__metadata__"].update({KEY: "x"})),
        "a header nested deep": headed(lambda header: header["__metadata__"].update({KEY: "[" * 100_000})),
        "a header of 30 MB": headed(
            lambda header: header["__metadata__"].update({KEY: '{"a":"' + "x" * (30 << 20) + '"}'})
        ),
        "runs of other key/value heads": resized(kv_heads=1, choosers=1),
        "runs of other choosers": resized(heads=12, kv_heads=2, choosers=3),
        "runs of other experts": resized(experts=9),
        "a run that sees what follows": told(lambda value: value["runs"][1].update(causal=False)),
        "30,000 tokens twice and 64 choosers": crowded,
        "another schema": told(lambda value: value.update(schema="sentei.trace/2")),
        "a key too many": told(lambda value: value.update(code="import os")),
        "a kind that is none": told(lambda value: value.update(kind="guessed")),
        "no runs": told(lambda value: value.update(runs=[])),
        "three runs": told(lambda value: value.update(runs=value["runs"] * 3)),
        "tokens that are none": told(lambda value: value["runs"][0].update(tokens=[])),
        "70,000 tokens": told(lambda value: value["runs"][0].update(tokens=[[0, ""]] * 70_000)),
        "a token number of 2^40": told(lambda value: value["runs"][0]["tokens"].__setitem__(0, [1 << 40, "a"])),
        "a token too long": told(lambda value: value["runs"][0]["tokens"].__setitem__(0, [1, "a" * 70_000])),
        "a prompt too long": told(lambda value: value["runs"][0].update(prompt=1000)),
        "a probability of NaN": told(lambda value: value["runs"][0].update(following=[["a", float("nan")]])),
        "a million heads": told(lambda value: value["runs"][0]["layers"][0].update(heads=1_000_000)),
        "2,000 layers": told(lambda value: value["runs"][0].update(layers=value["runs"][0]["layers"][:1] * 2000)),
        "a tensor of another run": headed(lambda header: header.update({"1.0.cost": header.pop(FIRST)})),
        "a tensor of another layer": headed(lambda header: header.update({"0.999.cost": header.pop(FIRST)})),
        "a tensor that is none": headed(lambda header: header.update({"0.0.evil": header.pop(FIRST)})),
        "another dtype": headed(lambda header: header[FIRST].update(dtype="I32")),
        "another shape": headed(lambda header: header[FIRST].update(shape=header[FIRST]["shape"][::-1])),
        "offsets that overlap": headed(lambda header: header[FIRST].update(data_offsets=[0, 72])),
        "1,000 layers of rows without choosers": spanned(1000, 0),
        "40 layers of as many rows as can be": spanned(40, 1),
        "200,000 tensors": raw_header(
            json.dumps(
                {"__metadata__": {KEY: "{}"}}
                | {f"{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)}
            ).encode()
        ),
        "a pipe": piped,
        "a link to a device": link("/dev/zero"),
    },
    twins={
        "as it is": as_it_is,
        "no costs": without("cost"),
        "nothing chosen in the second run": resized(choosers=0, experts=0, unit=0),
        "tokens of a stranger": told(
            lambda value: value["runs"][0]["tokens"].__setitem__(0, [1, "</script>\u001b[31m"])
        ),
    },
)


def text(folder: Path) -> Path:
    """A text."""
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("plain words, ünd more\n" * 100)
    return folder / "a.txt"


TEXT = Door(
    name="text",
    make=text,
    open=read_text,
    attacks={
        "empty": text_of(""),
        "blank": text_of(" \n" * 1000),
        "200 MB of blanks": lambda path: path.write_bytes(b" " * (200 << 20)) and None,
        "200 MB of zeros": sparse(200 << 20),
        "200 MB and then a zero": lambda path: path.write_bytes(b"a" * (200 << 20) + b"\0") and None,
        "a megabyte and then half a character": lambda path: (
            path.write_bytes(b"a" * ((1 << 20) - 1) + "é".encode()[:1]) and None
        ),
        "200 MB and then half a character": lambda path: (
            path.write_bytes(b"a" * (200 << 20) + "é".encode()[:1]) and None
        ),
        "emoji and then a zero": lambda path: path.write_bytes("\U0001f600".encode() * (50 << 20) + b"\0") and None,
        "1 TB": sparse(1 << 40),
        "not UTF-8": bytes_of(b"caf\xe9"),
        "half a character": bytes_of("é".encode()[:1]),
        "a surrogate": bytes_of(b"\xed\xa0\x80"),
        "longer than need be": bytes_of(b"\xc0\xae"),
        "UTF-16": bytes_of("text".encode("utf-16")),
        "a pickle": bytes_of(b"\x80\x04\x95" + CANARY),
        "a device": link("/dev/zero"),
        "a pipe": piped,
        "a folder": lambda path: path.unlink() or path.mkdir(),
        "a link to itself": link("a.txt"),
    },
    twins={
        "as it is": as_it_is,
        "with a mark": bytes_of(b"\xef\xbb\xbftext"),
        "control characters": text_of("\x1b[31m\u202e"),
        "one character": text_of("a"),
    },
)


def made(folder: Path) -> Path:
    """A folder an earlier run made."""
    path = folder / "out"
    path.mkdir(parents=True)
    (path / "sentei-run.json").write_text('{"schema": "sentei.run/1"}')
    (path / "stages").mkdir()
    (path / "metrics.jsonl").write_text("")
    return path


def open_out(path: Path) -> None:
    """What a run does with its folder first."""
    with claimed(path, "sentei-run.json", "sentei prune"):
        (path / "metrics.jsonl").open("a").close()


def led_out(name: str):
    """An entry of the folder is a link that leads elsewhere."""

    def spoil(path: Path) -> None:
        outside = path.parent / "elsewhere"
        if (path / name).is_dir():
            (path / name).rmdir()
            outside.mkdir()
        else:
            (path / name).unlink(missing_ok=True)
            outside.write_text("mine")
        (path / name).symlink_to(outside)

    return spoil


OUT = Door(
    name="folder of a run",
    make=made,
    open=open_out,
    attacks={
        f"{name} leads elsewhere": led_out(name)
        for name in ("metrics.jsonl", "stages", ".lock", "sentei-run.json", "config.json")
    }
    | {"a link within": lambda path: (path / "stages" / "slack.json").symlink_to("/etc/passwd")},
    twins={"as it is": as_it_is, "empty": lambda path: shutil.rmtree(path) or path.mkdir()},
)
