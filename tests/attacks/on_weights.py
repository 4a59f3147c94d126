"""Attacks on weights: safetensors in one file and in several, and GGUF."""

import json
import os
import shutil
import struct
from pathlib import Path

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
    link,
    moved_out,
    raw_header,
    sparse,
    twice,
)
from safetensors.torch import load_file, save_file
from tiny import gguf_bytes, save_tiny, save_tiny_gguf

from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.tokenizers import require_known

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
CANARY = b"cposix\nsystem\n(S'touch canary'\ntR."  # a pickle that runs a command
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def model(folder: Path) -> Path:
    """A tiny model in one file."""
    return save_tiny(folder / "model", "llama")


def sharded(folder: Path) -> Path:
    """The same in two files and an index."""
    path = model(folder)
    tensors = load_file(path / "model.safetensors")
    names, placed = sorted(tensors), {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / shard, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, shard)
    (path / "model.safetensors").unlink()
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return path


def open_model(path: Path) -> None:
    """What `sentei prune` does with a model before anything else."""
    checkpoint = locate(str(path), cache=Path.home() / "cache")
    tokens = load_tokenizer(checkpoint)("plain text")["input_ids"]
    require_known(max(tokens), load_model(checkpoint).config.vocab_size, checkpoint.name)


def filled(value: float, dtype: torch.dtype = torch.float32):
    """One element of one tensor is `value`."""

    def spoil(path: Path) -> None:
        tensors = load_file(path)
        tensors[NORM][3] = value
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    return spoil


def tensors_named(count: int, kind: str = "F32") -> bytes:
    """A header of `count` tensors without elements."""
    return (
        "{"
        + ",".join(f'"{number}":{{"dtype":"{kind}","shape":[0],"data_offsets":[0,0]}}' for number in range(count))
        + "}"
    ).encode()


def pickled(path: Path) -> Path:
    path.with_suffix(".bin").write_bytes(CANARY)
    path.unlink()
    return path.parent


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def zipped(path: Path) -> None:
    """What torch.save writes, under the name of safetensors."""
    torch.save({"weight": torch.zeros(2)}, path)


W = "model.safetensors"
SAFETENSORS = Door(
    name="safetensors",
    make=model,
    open=open_model,
    attacks={
        **{f"cut to {keep} bytes": at(W, cut(keep)) for keep in (0, 7, 8, 9, 100, -1, -4)},
        **{f"cut to {keep:.0%}": at(W, cut(keep)) for keep in (0.1, 0.5, 0.99)},
        **{
            f"a header said to have {length} bytes": at(W, headed(lambda _: None, length))
            for length in (0, 1, 1 << 31, 2**63, 2**64 - 1)
        },
        "one byte more": at(W, lambda path: path.write_bytes(path.read_bytes() + b"x") and None),
        "a pickle": at(W, bytes_of(CANARY)),
        "a zip with a pickle": at(W, zipped),
        "a pickle beside nothing": lambda path: pickled(path / W),
        "an empty object": at(W, raw_header(b"{}")),
        "a list": at(W, raw_header(b"[]")),
        "no JSON": at(W, raw_header(b"{'a': 1}")),
        "not UTF-8": at(W, raw_header(b"\xff\xfe{}")),
        "nested deep": at(W, raw_header(deep(100_000))),
        "objects nested deep": at(W, raw_header(deep(100_000, b'{"a":'))),
        "a number of 5,000 digits": at(W, raw_header(b'{"a":' + b"9" * 5000 + b"}")),
        "a header of zeros, 99 MB": at(W, sparse(100 << 20, struct.pack("<Q", 99_000_000))),
        "a header of one name, 60 MB": at(W, raw_header(b'{"' + b"a" * (60 << 20) + b'":1}')),
        "a name of emoji, 60 MB": at(W, raw_header(b'{"' + "\U0001f600".encode() * (15 << 20) + b'":1}')),
        "a bomb of lists": at(W, raw_header(b'{"a":[' + b"[]," * 1_900_000 + b"0]}")),
        "a bomb of objects": at(W, raw_header(b'{"a":[' + b'{"b":0},' * 1_300_000 + b"0]}")),
        "a bomb of escapes": at(W, raw_header(b'{"a":"' + b"\\ud83d\\ude00" * (1 << 20) + b'"}')),
        "100,000 tensors": at(W, raw_header(tensors_named(100_000))),
        "280,000 tensors": at(W, raw_header(tensors_named(280_000))),
        "a name twice": at(
            W,
            raw_header(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                bytes(4),
            ),
        ),
        "a tensor too few": at(W, headed(lambda header: header.pop(NORM))),
        "a tensor too many": at(
            W, headed(lambda header: header.update(evil=ENTRY | {"shape": [0], "data_offsets": [0, 0]}))
        ),
        "another shape of as many bytes": at(W, headed(lambda header: header[NORM].update(shape=[8, 8]))),
        "a shape of 2^64 elements": at(W, headed(lambda header: header[NORM].update(shape=[1 << 32, 1 << 32]))),
        "a negative shape": at(W, headed(lambda header: header[NORM].update(shape=[-64]))),
        "a shape of floats": at(W, headed(lambda header: header[NORM].update(shape=[64.0]))),
        "17 dimensions": at(W, headed(lambda header: header[NORM].update(shape=[64] + [1] * 16))),
        "offsets that overlap": at(W, headed(lambda header: header[NORM].update(data_offsets=[0, 256]))),
        "offsets beyond the file": at(
            W, headed(lambda header: header[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256]))
        ),
        "offsets that go back": at(W, headed(lambda header: header[NORM].update(data_offsets=[256, 0]))),
        "an unknown dtype": at(W, headed(lambda header: header[NORM].update(dtype="F33"))),
        "a dtype that is a list": at(W, headed(lambda header: header[NORM].update(dtype=["F32"]))),
        "another dtype of as many bytes": at(W, headed(lambda header: header[NORM].update(dtype="F64", shape=[32]))),
        "metadata that is a list": at(W, headed(lambda header: header.update(__metadata__=[1]))),
        "metadata of numbers": at(W, headed(lambda header: header.update(__metadata__={"format": 1}))),
        "NaN": at(W, filled(float("nan"))),
        "infinity": at(W, filled(float("inf"))),
        "minus infinity in bfloat16": at(W, filled(float("-inf"), torch.bfloat16)),
        "a link that leads elsewhere": at(W, moved_out),
        "a link to a device": at(W, link("/dev/zero")),
        "a link to itself": at(W, link(W)),
        "a pipe": at(W, piped),
        "a folder": at(W, lambda path: path.unlink() or path.mkdir()),
    },
    twins={
        "as it is": as_it_is,
        "another format": at(W, headed(lambda header: header.update(__metadata__={"format": "evil"}))),
        "in bfloat16": at(W, filled(1.0, torch.bfloat16)),
        "metadata of its own": at(
            W, headed(lambda header: header.update(__metadata__={"format": "pt", "by": "me\u202e\x1b[31m"}))
        ),
        "a pickle beside it": lambda path: (path / "pytorch_model.bin").write_bytes(CANARY) and None,
        "code beside it": lambda path: (path / "modeling_llama.py").write_text("open('canary', 'w')") and None,
    },
)


def placing(name: str):
    """The index places one tensor in the file `name`."""
    return at(INDEX, edited(lambda index: index["weight_map"].update({NORM: name})))


SHARD = "model-00002-of-00002.safetensors"
SHARDS = Door(
    name="sharded safetensors",
    make=sharded,
    open=open_model,
    attacks={
        **{
            f"a shard called {name!r}": placing(name)
            for name in (
                "../model.safetensors",
                "/etc/model.safetensors",
                "a/b.safetensors",
                "..\\a.safetensors",
                "a\0.safetensors",
            "a\x1b[31m\u202e.safetensors",
                "none.safetensors",
                "pytorch_model.bin",
                ".",
                "",
                "a" * 300 + ".safetensors",
            )
        },
        **{
            f"a map that is {value!r}": at(INDEX, edited(lambda index, value=value: index.update(weight_map=value)))
            for value in (None, [], {}, "x", {NORM: 1})
        },
        "an index of half": at(INDEX, cut(0.5)),
        "an index nested deep": at(INDEX, bytes_of(deep(100_000, b'{"a":'))),
        "an index of 65 MB": at(INDEX, sparse(65 << 20, b"{")),
        "an index of 400,000 files": at(
            INDEX, edited(lambda index: index.update(weight_map={str(n): f"{n}.safetensors" for n in range(400_000)}))
        ),
        "an index with a key twice": at(INDEX, twice("weight_map")),
        "a tensor the index has elsewhere": at(
            INDEX, edited(lambda index: index["weight_map"].update({NORM: "model-00001-of-00002.safetensors"}))
        ),
        "a tensor in both": lambda path: save_file(
            load_file(path / SHARD) | load_file(path / "model-00001-of-00002.safetensors"),
            path / SHARD,
            metadata={"format": "pt"},
        ),
        "a shard that is a link elsewhere": at(SHARD, moved_out),
        "a shard that is a pipe": at(SHARD, piped),
        "a shard that is cut": at(SHARD, cut(-1)),
        "a shard that is a pickle": at(SHARD, bytes_of(CANARY)),
    },
    twins={
        "as it is": as_it_is,
        "with links inside": at(SHARD, lambda path: path.rename(path.parent / "real") and path.symlink_to("real")),
    },
)


def gguf(folder: Path) -> Path:
    """A tiny GGUF file."""
    folder.mkdir(parents=True)
    save_tiny_gguf(folder / "tiny.gguf", "llama")
    return folder / "tiny.gguf"


def valued(**values):
    """A tiny GGUF file with further values, or others."""
    return lambda path: (
        save_tiny_gguf(path, "llama", **{name.replace("__", "."): value for name, value in values.items()}) and None
    )


def pairs(count: int, one: bytes) -> bytes:
    """A GGUF header without tensors that holds `count` values, each of them `one`."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + one


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def many_texts(count: int) -> bytes:
    """Values of 15 MB of text each."""
    return b"".join(text(f"{n:08}") + struct.pack("<IQ", 8, 15 << 20) + bytes(15 << 20) for n in range(count))


def many_tensors(count: int) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 0)
    return head + b"".join(text(str(n)) + struct.pack("<IQIQ", 1, 0, 0, 0) for n in range(count)) + bytes(64)


def placed_at(shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A GGUF file whose one tensor says this of itself, and has 64 bytes."""
    return gguf_bytes({"general.architecture": "llama"}, {"token_embd.weight": (shape, kind, offset, bytes(64))})


LLAMA = "llama__"
GGUF = Door(
    name="GGUF",
    make=gguf,
    open=open_model,
    attacks={
        **{f"cut to {keep} bytes": cut(keep) for keep in (0, 3, 4, 8, 23, 24, 32, 100, 1000, -64)},
        **{f"cut to {keep:.0%}": cut(keep) for keep in (0.05, 0.5, 0.98)},
        "another magic": lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]) and None,
        "a pickle": bytes_of(CANARY),
        "2^63 tensors": bytes_of(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(64)),
        "2^63 values": bytes_of(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64)),
        "900,000 tensors": bytes_of(many_tensors(900_000)),
        "a name of 2^62 bytes": bytes_of(pairs(1, struct.pack("<Q", 2**62))),
        "16 million empty texts": sparse(136 << 20, pairs(1, text("a") + struct.pack("<IIQ", 9, 8, 16 << 20))),
        "12 arrays of 1.3 million texts": bytes_of(
            pairs(
                12,
                b"".join(
                    text(f"{n:02}") + struct.pack("<IIQ", 9, 8, 1_300_000) + bytes(8 * 1_300_000) for n in range(12)
                ),
            )
        ),
        "400 MB of texts": bytes_of(pairs(27, many_texts(27))),
        "an array of 2^63": bytes_of(pairs(1, text("a") + struct.pack("<IIQ", 9, 12, 2**63))),
        "an array of arrays": bytes_of(pairs(1, text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64))),
        "a value of type 99": bytes_of(pairs(1, text("a") + struct.pack("<I", 99) + bytes(64))),
        "a key twice": bytes_of(gguf_bytes({"aa": 1, "ab": 1}, {}).replace(b"ab", b"aa")),
        "an alignment of 0": valued(general__alignment=0),
        "an alignment of 48": valued(general__alignment=48),
        "an alignment that is text": valued(general__alignment="32"),
        "no tensors": bytes_of(gguf_bytes({"general.architecture": "llama"}, {})),
        "a shape whose product overflows": bytes_of(placed_at((2**31, 2**31, 4), 0, 0)),
        "a shape larger than the file": bytes_of(placed_at((2**40,), 0, 0)),
        "an offset beyond the file": bytes_of(placed_at((2,), 0, 2**40)),
        "an offset that wraps around": bytes_of(placed_at((2,), 0, 2**64 - 32)),
        "an offset between": bytes_of(placed_at((2,), 0, 7)),
        "a row of half a block": bytes_of(placed_at((2, 31), 3, 0)),
        "tensors that overlap": bytes_of(
            gguf_bytes({}, {"a": ((16,), 0, 0, bytes(64)), "b": ((16,), 0, 32, bytes(64))})
        ),
        "five dimensions": bytes_of(placed_at((1,) * 5, 0, 0)),
        "a billion layers": valued(llama__block_count=1_000_000_000),
        "1,000 layers": valued(llama__block_count=1000),
        "a width of text": valued(llama__embedding_length="64"),
        "a width it does not have": valued(llama__embedding_length=128),
        "no heads": valued(**{"llama__attention__head_count": 0}),
        "an epsilon of NaN": valued(**{"llama__attention__layer_norm_rms_epsilon": float("nan")}),
        "a vocabulary of half": valued(**{"tokenizer__ggml__tokens": ["<unk>", "<s>"]}),
        "merges of nothing": valued(**{"tokenizer__ggml__merges": ["a b", "c d"]}),
        "an unknown tokenizer": valued(**{"tokenizer__ggml__model": "surprise"}),
        "a pipe": piped,
        "a link to a device": link("/dev/zero"),
        "a folder": lambda path: path.unlink() or path.mkdir(),
    },
    twins={
        "as it is": as_it_is,
        "with a template": valued(tokenizer__chat_template="{{ ''.__class__.__mro__ }}"),
        "more values": valued(general__name="a name\x1b[31m", general__author="\u202e"),
        "a link to it": lambda path: path.with_name("other.gguf").symlink_to(path) or path.with_name("other.gguf"),
        "copied": lambda path: shutil.copy(path, path.with_name("copy.gguf")) and path.with_name("copy.gguf"),
    },
)
