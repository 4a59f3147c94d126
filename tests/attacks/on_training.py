"""Attacks on what `sentei train` reads: jobs, checkpoints, trained models and files of tokens."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from attacks.door import (
    Door,
    as_it_is,
    at,
    bytes_of,
    cut,
    deep,
    edited,
    headed,
    keys,
    link,
    moved_out,
    sparse,
    text_of,
    twice,
)
from attacks.on_weights import CANARY, piped
from safetensors.torch import load_file, save_file

from sentei.core.storage import sha256
from sentei.model import Config as Shape
from sentei.model import Transformer
from sentei.training import checkpoints, data, job

JOB = ("model: {width: 16, layers: 1, heads: [2, 2], feed_forward: 32}\n"
       "data: {context: 16, held_out: 2}\ntraining: {steps: 3}\n")


def yaml(folder: Path) -> Path:
    """A job for `sentei train`."""
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


def open_yaml(path: Path) -> None:
    """Reads the job, and what it names."""
    _, read, *_ = job.read_job(path)
    data.tokenizer_of(read.tokenizer, path.parent)
    data.texts_of(read.text, path.parent)


def said(content: str):
    """Another job."""
    return text_of(content)


YAML = Door(
    name="YAML of sentei train",
    make=yaml,
    open=open_yaml,
    attacks={
        "empty": said(""),
        "a list": said("- a\n"),
        "a tag that runs": said("!!python/object/apply:os.system ['touch canary']\n"),
        "a tag in a value": said("model: !!python/name:os.system\n"),
        "a tag that is harmless": said("model: !!map {}\n"),
        "a bomb of aliases": said("a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n"),
        "a merge": said("model: {<<: {width: 16}}\n"),
        "two documents": said("model: {}\n---\nmodel: {}\n"),
        "a key twice": said("model: {width: 16, width: 16}\n"),
        "a key that is a number": said("1: 2\n"),
        "a key that is a list": said("? [a]\n: 1\n"),
        "nested deep": said("model: " + "[" * 20_000),
        "objects nested deep": said("model: " + "{a: " * 20_000),
        "indented deep": said("".join(f"{' ' * n}a{n}:\n" for n in range(600))),
        "24,000 keys": said("model: {" + ",".join(f"a{n}: 1" for n in range(24_000)) + "}\n"),
        "400,000 lists": said("model: [" + "[]," * 400_000 + "]\n"),
        "as many lists as may be": said("model: [" + "[]," * 21_000 + "]\n"),
        "as many keys as may be": said("model: {" + ",".join(f"a{n}: 1" for n in range(6_000)) + "}\n"),
        "a text of 260,000 letters": said("model: '" + "x" * 260_000 + "'\n"),
        "1 MB": sparse(1 << 20, b"model: "),
        "not UTF-8": bytes_of(b"model: \xff\n"),
        "control characters": said("model: \x1b[31m\n"),
        "a pickle": bytes_of(CANARY),
        "an unknown section": said("os: {system: x}\n"),
        "an unknown key": said("model: {__class__: x}\n"),
        "a width of 10^18": said("model: {width: 1000000000000000000}\n"),
        "a width of NaN": said("model: {width: .nan}\n"),
        "a width that is a date": said("model: {width: 2001-02-03}\n"),
        "a date that is none": said("model: {width: 2001-99-99}\n"),
        "a width in base 60": said("model: {width: " + ":".join(["59"] * 20_000) + "}\n"),
        "a number of 5,000 digits": said("model: {width: " + "9" * 5000 + "}\n"),
        "a million layers": said("model: {layers: 1000000}\n"),
        "an infinite rate": said("training: {optimizer: {rate: .inf}}\n"),
        "steps of NaN": said("training: {steps: .nan}\n"),
        "a device as text": said("data: {text: [/dev/zero]}\n"),
        "a text that is not there": said("data: {text: [../../none]}\n"),
        "a tokenizer that is no such file": said("data: {tokenizer: /etc/passwd}\n"),
        "a room that is none": said("model: {feed_forward: {room: os.system}}\n"),
        "a gate that is none": said("model: {feed_forward: {room: experts, gate: {name: os.system}}}\n"),
        "a link to a device": link("/dev/zero"),
        "a pipe": piped,
    },
    twins={"as it is": as_it_is, "short numbers": said(JOB + "balance: {}\n"), "a comment": said("# \u202e\n" + JOB)},
)


def tensors() -> dict[str, torch.Tensor]:
    """What the tiny checkpoints hold."""
    return {"model.a": torch.arange(12.0).reshape(3, 4), "optimizer.a.step": torch.tensor(3.0)}


def saved(folder: Path) -> Path:
    """Two checkpoints, as training writes them."""
    path = folder / "run"
    for step in (1, 2):
        checkpoints.save(path, step, tensors(), {"job": {}, "rows": []})
    return path


def open_checkpoint(path: Path) -> None:
    """What training does before it goes on."""
    found = checkpoints.newest(path)
    shapes = found.shapes()
    if shapes != {name: tensor.shape for name, tensor in tensors().items()}:
        raise checkpoints.FileError("checkpoint", expected="these tensors", got="others", do="")
    found.fill({name: torch.zeros(shape) for name, shape in shapes.items()})


M, D = "checkpoint-00000002.json", "checkpoint-00000002.safetensors"


def manifest(change: Callable[[dict], object]):
    """Changes the file that says what is in the newest checkpoint."""
    return at(M, edited(change))


def resealed(spoil: Callable[[Path], object]):
    """Changes the tensors, and then what the manifest says of them: a lie that is whole."""

    def both(path: Path) -> None:
        spoil(path / D)
        about = {"bytes": (path / D).stat().st_size, "sha256": sha256(path / D)}
        manifest(lambda value: value["files"].update({D: about}))(path)

    return both


def in_parts(**changes):
    """The newest checkpoint in two parts, which say of their places what DCP says, and `changes`."""

    def spoil(path: Path) -> None:
        values, files = tensors()["model.a"], {}
        (path / D).unlink()
        for number, rows in enumerate((values[:2], values[2:]), 1):
            offsets = [0, 0] if number == 1 else [2, 0]
            about = {"model.a": {"saved_offsets": offsets}} | (
                {"optimizer.a.step": {"saved_offsets": []}} if number == 1 else {}
            )
            content = {"model.a": rows.contiguous()} | ({"optimizer.a.step": torch.tensor(3.0)} if number == 1 else {})
            part = path / f"checkpoint-00000002-{number}-of-2.safetensors"
            save_file(
                content, part, metadata={"DCP_SHARDING_INFO": changes.get("about", json.dumps(about)), "format": "pt"}
            )
            files[part.name] = {"bytes": part.stat().st_size, "sha256": sha256(part)}
        manifest(lambda value: value.update(files=files))(path)

    return spoil


CHECKPOINT = Door(
    name="checkpoint",
    make=saved,
    open=open_checkpoint,
    attacks={
        **{f"manifest cut to {keep:.0%}": at(M, cut(keep)) for keep in (0.0, 0.5, 0.95)},
        **{f"tensors cut to {keep}": at(D, cut(keep)) for keep in (0, 8, -1)},
        "tensors with a bit changed": at(D, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f") and None),
        "no tensors": at(D, Path.unlink),
        "tensors that are a pickle": resealed(bytes_of(CANARY)),
        "tensors that are a zip": resealed(lambda path: torch.save({}, path)),
        "manifest nested deep": at(M, bytes_of(deep(100_000, b'{"a":'))),
        "manifest of 65 MB": at(M, sparse(65 << 20, b"{")),
        "another schema": manifest(lambda value: value.update(schema="sentei.checkpoint/1")),
        "another step": manifest(lambda value: value.update(step=3)),
        "no files": manifest(lambda value: value.update(files={})),
        "files that are a list": manifest(lambda value: value.update(files=[D])),
        "a file elsewhere": manifest(lambda value: value.update(files={"../" + D: value["files"][D]})),
        "a file by its path": manifest(lambda value: value.update(files={"/etc/passwd": value["files"][D]})),
        "a file of another step": manifest(
            lambda value: value.update(files={"checkpoint-00000001.safetensors": value["files"][D]})
        ),
        "a key twice": at(M, twice("files")),
        "a tensor too many": resealed(lambda path: save_file(tensors() | {"evil": torch.zeros(2)}, path)),
        "a tensor too few": resealed(lambda path: save_file({"model.a": torch.zeros(3, 4)}, path)),
        "other shapes": resealed(lambda path: save_file(tensors() | {"model.a": torch.zeros(4, 3)}, path)),
        "another dtype": resealed(
            lambda path: save_file({**tensors(), "model.a": torch.zeros(3, 4, dtype=torch.int64)}, path)
        ),
        "offsets that overlap": resealed(headed(lambda header: header["model.a"].update(data_offsets=[2, 50]))),
        "parts without places": in_parts(about="{}"),
        "parts with places that are none": in_parts(about="[" * 1000),
        "parts that overlap": in_parts(
            about=json.dumps({"model.a": {"saved_offsets": [0, 0]}, "optimizer.a.step": {"saved_offsets": []}})
        ),
        "parts far away": in_parts(
            about=json.dumps({"model.a": {"saved_offsets": [1 << 40, 0]}, "optimizer.a.step": {"saved_offsets": []}})
        ),
        "parts before the first": in_parts(
            about=json.dumps({"model.a": {"saved_offsets": [-1, 0]}, "optimizer.a.step": {"saved_offsets": []}})
        ),
        "a part missing": lambda path: in_parts()(path) or (path / "checkpoint-00000002-2-of-2.safetensors").unlink(),
        "tensors that are a pipe": at(D, piped),
        "a manifest that is a pipe": at(M, piped),
        "tensors that are a link elsewhere": at(D, moved_out),
    },
    twins={
        "as it is": as_it_is,
        "in parts": in_parts(),
        "an older one that is broken": at("checkpoint-00000001.json", bytes_of(b"{")),
        "NaN, of a run that diverged": resealed(
            lambda path: save_file(tensors() | {"model.a": torch.full((3, 4), float("nan"))}, path)
        ),
        "what a kill leaves": lambda path: (path / ".checkpoint-00000003.json.x.part").write_text("{") and None,
    },
)


def trained(folder: Path) -> Path:
    """What `sentei train` writes."""
    path, shape = folder / "trained", Shape(width=16, layers=1, heads=(2, 2), feed_forward=32)
    job.write_model(Transformer(shape).state_dict(), shape, path)
    return path


W, C = "model.safetensors", "config.json"


def shaped(**changes):
    """Changes the model's shape."""
    return at(C, edited(lambda value: value["model"].update(changes)))


TRAINED = Door(
    name="trained model",
    make=trained,
    open=job.load_model,
    attacks={
        **{f"weights cut to {keep}": at(W, cut(keep)) for keep in (0, 8, -1)},
        "weights that are a pickle": at(W, bytes_of(CANARY)),
        "weights with a tensor too many": at(
            W, lambda path: save_file(load_file(path) | {"evil": torch.zeros(2, dtype=torch.int64)}, path)
        ),
        "weights in another dtype": at(
            W, lambda path: save_file({name: value.double() for name, value in load_file(path).items()}, path)
        ),
        "NaN": at(
            W, lambda path: save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
        ),
        "a shape that is none": at(C, keys(model=None)),
        "a width of 10^9": shaped(width=1_000_000_000),
        "1,024 layers": shaped(layers=1024),
        "a vocabulary of 10^9": shaped(vocabulary=1_000_000_000),
        "an unknown key": shaped(evil=1),
        "another schema": at(C, keys(schema="x")),
        "a config nested deep": at(C, bytes_of(deep(100_000, b'{"a":'))),
        "a config with a key twice": at(C, twice("model")),
        "weights that are a pipe": at(W, piped),
        "weights that are a link elsewhere": at(W, moved_out),
        "a config that is a link elsewhere": at(C, moved_out),
    },
    twins={"as it is": as_it_is},
)


def tokens(folder: Path) -> Path:
    """A file of tokens."""
    folder.mkdir(parents=True)
    return data.prepare(["one two three " * 50], data.Bytes(), folder)


def open_tokens(path: Path) -> None:
    """Maps it, and reads a batch."""
    data.Windows(path, context=16, held_out=2, seed=0).batch(0, 4)


def retold(values, **about):
    """A file of tokens that says the truth of other tokens, or lies."""

    def spoil(path: Path) -> None:
        told = {
            "format": data.FORMAT,
            "vocabulary": "257",
            "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        } | about
        save_file({"tokens": torch.from_numpy(values)}, path, metadata=told)

    return spoil


GOOD = np.arange(500, dtype=np.uint16) % 257
TOKENS = Door(
    name="tokens",
    make=tokens,
    open=open_tokens,
    attacks={
        **{f"cut to {keep}": cut(keep) for keep in (0, 8, 100, -1)},
        "a token changed": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x01\x00") and None,
        "a token beyond the vocabulary": retold(GOOD + np.uint16(300)),
        "a negative token": retold(-GOOD.astype(np.int32)),
        "another dtype": retold(GOOD.astype(np.float32)),
        "two dimensions": retold(GOOD.reshape(2, 250)),
        "a vocabulary of 5,000 digits": retold(GOOD, vocabulary="9" * 5000),
        "a vocabulary that is a superscript": retold(GOOD, vocabulary="²"),
        "no vocabulary": retold(GOOD, vocabulary=""),
        "a vocabulary that is half a pair": headed(lambda header: header["__metadata__"].update(vocabulary="\ud800")),
        "another format": retold(GOOD, format="x"),
        "a pickle": bytes_of(CANARY),
        "a pipe": piped,
    },
    twins={"as it is": as_it_is, "others": retold(GOOD)},
)
