"""Trace files come back as they were, and files that lie are refused with their own message."""

import json
import struct

import pytest
import torch
from circuits import controlled, hostile, observed, ran

from sentei.circuit.file import header_of, is_trace, load, save, tensors_of
from sentei.circuit.run import Circuit
from sentei.conversion.inspection import inspect
from sentei.core.errors import FileError
from sentei.core.trace_header import KEY

CIRCUITS = {"observed": observed, "ran": ran, "hostile": lambda: observed(hostile, (25, 26)), "controlled": controlled}


@pytest.mark.parametrize("make", CIRCUITS.values(), ids=CIRCUITS.keys())
def test_a_trace_comes_back(make, tmp_path):
    save(make(), tmp_path / "a.trace")
    found = load(tmp_path / "a.trace")
    assert is_trace(tmp_path / "a.trace") and header_of(found) == header_of(make())
    expected = tensors_of(make())
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors_of(found).items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in expected.items()}


def test_it_is_safetensors_for_everybody(tmp_path):
    from safetensors import safe_open

    save(observed(), tmp_path / "a.trace")
    with safe_open(tmp_path / "a.trace", framework="pt") as file:
        assert json.loads(file.metadata()[KEY])["schema"] == "sentei.trace/1"
        assert file.get_tensor("0.1.cost").shape == (9, 2)


def test_other_files_are_no_traces(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing")
    assert not is_trace(tmp_path / "a") and not is_trace(tmp_path / "b") and not is_trace(tmp_path)


def forged(path, change, circuit: Circuit | None = None):
    """A trace whose header and table of tensors `change(header, entries)` has changed."""
    save(circuit or observed(), path)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8:8 + size])
    header = json.loads(entries["__metadata__"][KEY])
    change(header, entries)
    entries["__metadata__"][KEY] = header if isinstance(header, str) else json.dumps(header)
    written = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + size:])
    return path


def put(*keys, value):
    def change(header, entries):
        place = header
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    return change


def rename(old, new):
    def change(header, entries):
        entries[new] = entries.pop(old)
    return change


def reshape(name, shape, dtype=None):
    def change(header, entries):
        entries[name] |= {"shape": shape} | ({"dtype": dtype} if dtype else {})
    return change


LIES = {
    "another schema": (put("schema", value="sentei.trace/2"), "schema sentei.trace/1"),
    "a key too many": (put("code", value="import os"), "the keys bypasses|the keys date"),
    "a kind": (put("kind", value="guessed"), "kind ran or observed"),
    "no runs": (put("runs", value=[]), "one to three runs"),
    "a model with a long name": (put("model", value="a" * 60_000), "text as model, of at most 1,024"),
    "a long rule": (put("rule", value="a" * 1025), "text as rule, of at most 1,024"),
    "a long date": (put("date", value="a" * 1025), "text as date, of at most 1,024"),
    "a long version": (put("versions", value={"torch": "a" * 1025}), "versions by name"),
    "a version of a long name": (put("versions", value={"a" * 1025: "2"}), "versions by name"),
    "many versions": (put("versions", value={str(number): "2" for number in range(101)}), "at most 100 versions"),
    "a long bypass": (put("runs", 0, "bypasses", value=["a" * 1025]), "bypasses as text"),
    "many bypasses": (put("runs", 0, "bypasses", value=["a"] * 1001), "at most 1000 bypasses"),
    "a model that is no text": (put("model", value=3), "text as model"),
    "a version": (put("versions", value={"torch": 2}), "versions by name"),
    "a run's key": (put("runs", 0, "eval", value="1"), "runs with the keys"),
    "four runs": (lambda header, _: header["runs"].extend(header["runs"]), "one to three runs"),
    "tokens": (put("runs", 0, "tokens", value=[]), "1 to 65534 tokens"),
    "a token": (put("runs", 0, "tokens", 0, value=[-1, "a"]), "1 to 65534 tokens"),
    "a long token": (put("runs", 0, "tokens", 0, value=[1, "a" * 70_000]), "1 to 65534 tokens"),
    "a prompt": (put("runs", 0, "prompt", value=99), "a prompt no longer"),
    "causal": (put("runs", 0, "causal", value=1), "causal a bool"),
    "layers": (put("runs", 0, "layers", value=[]), "1 to 1000 layers"),
    "a layer's heads": (put("runs", 0, "layers", 0, "heads", value=1 << 40), "1 to 1000 layers"),
    "heads not shared evenly": (put("runs", 0, "layers", 0, "kv_heads", value=3), "1 to 1000 layers"),
    "other layers in one run": (lambda header, _: header["runs"][1]["layers"].pop(), "as many layers"),
    "a probability": (put("runs", 0, "following", value=[["a", 2.0]]), "next tokens"),
    "a bypass": (put("runs", 0, "bypasses", value=[1]), "bypasses as text"),
    "experts": (lambda header, _: [run["layers"][0].update(experts=60_000) for run in header["runs"]],
                "a known part of the size"),
    "experts of one run": (put("runs", 0, "layers", 0, "experts", value=60_000), "the same sizes in layer 0"),
    "groups of one run": (put("runs", 1, "layers", 2, "kv_heads", value=1), "the same sizes in layer 2"),
    "choosers of one run": (lambda header, _: [
        run["layers"][1].update(heads=12, choosers=count) for run, count in zip(header["runs"], (4, 3), strict=True)],
        "the same sizes in layer 1"),
    "one run that sees what follows": (put("runs", 1, "causal", value=False), "all causal, or none"),
    "more to compare than memory": (lambda header, _: [run.update(tokens=[[1, "a"]] * 30_000)
                                                       for run in header["runs"]], "at most 536,870,912 pairs"),
    "more tokens than the tensors": (put("runs", 0, "tokens", value=[[1, "a"]] * 10), "a known part of the size"),
    "a name": (rename("0.0.cost", "0.0.pickle.data"), "a known part|tensors named"),
    "a name outside": (rename("0.0.cost", "0.99.cost"), "runs and layers that are there"),
    "a name with zeros": (rename("0.0.cost", "0.00.cost"), "runs and layers that are there"),
    "a path as a name": (rename("0.0.cost", "../cost"), "tensors named"),
    "a dtype": (reshape("0.0.cost", [9, 2], "I32"), "a known part of the size"),
    "an unknown part": (rename("0.0.connections.bits", "0.0.connections.bit"), "a known part of the size"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES.keys())
def test_lies_are_refused(change, message, tmp_path):
    path = forged(tmp_path / "a.trace", change)
    with pytest.raises(FileError, match=message) as caught:
        load(path)
    assert caught.value.exit_code == 3 and len(str(caught.value)) < 600
    assert str(inspect(path)[1]) == str(caught.value)  # as told by `sentei inspect`, without torch


def rewritten(path, **tensors):
    """A trace whose first run has other tensors, or where they are None has them not."""
    circuit = observed()
    run = circuit.runs[0]
    found = {name: tensor for name, tensor in (run.tensors | tensors).items() if tensor is not None}
    other = type(run)(**{**vars(run), "tensors": found})
    save(Circuit(**{**vars(circuit), "runs": (other, circuit.runs[1])}), path)
    return path


@pytest.mark.parametrize(("spans", "message"), [
    ([[0, 10, 1, 1]], "spans within"), ([[4, 9, 1, 1]], "spans within"), ([[0, 9, 0, 1]], "spans within"),
    ([[0, 9, 1, -1]], "spans within"), ([[0, 8, 1, 1]], "bytes and"), ([[0, 9, 2, 1]], "bytes and"),
    ([[-1, 9, 1, 1]], "spans within"), ([[0, 4, 1, 1], [3, 6, 1, 1]], "spans within"),
])
def test_spans_that_do_not_fit_are_refused(spans, message, tmp_path):
    wrong = {"1.connections.spans": torch.tensor(spans, dtype=torch.int32)}
    with pytest.raises(FileError, match=message):
        load(rewritten(tmp_path / "a.trace", **wrong))


@pytest.mark.parametrize("part", ["spans", "bits", "ids", "weights"])
def test_connections_are_whole_or_not_there(part, tmp_path):
    with pytest.raises(FileError, match="all parts of connections in layer 1"):
        load(rewritten(tmp_path / "a.trace", **{f"1.connections.{part}": None}))
    bare = {f"1.connections.{part}": None for part in ("spans", "bits", "ids", "weights")}
    assert load(rewritten(tmp_path / "a.trace", **bare)).runs[0].spans(1) == []


def test_candidates_that_are_not_there_are_refused(tmp_path):
    ids = observed().runs[0].get(1, "connections.ids").int()
    ids[0, 0, 0] = 9
    with pytest.raises(FileError, match="candidates below 9"):
        load(rewritten(tmp_path / "a.trace", **{"1.connections.ids": ids.to(torch.uint16)}))


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_part_of_a_file_is_refused(cut, tmp_path):
    save(observed(), tmp_path / "a.trace")
    (tmp_path / "a.trace").write_bytes((tmp_path / "a.trace").read_bytes()[:cut])
    with pytest.raises(FileError):
        load(tmp_path / "a.trace")


def test_a_header_nested_too_deep_is_refused(tmp_path):
    def change(header, entries):
        header["date"] = "x"

    path = forged(tmp_path / "a.trace", change)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8:8 + size])
    entries["__metadata__"][KEY] = "[" * 100_000
    written = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + size:])
    with pytest.raises(FileError, match="one JSON object"):
        load(path)
