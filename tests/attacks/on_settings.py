"""Attacks on what lies beside the weights: config.json, tokenizer and templates, adapters, and sentei's own policy."""

import json
from collections.abc import Callable
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
    keys,
    link,
    moved_out,
    sparse,
    text_of,
    twice,
)
from attacks.on_weights import CANARY, model, open_model, piped
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from torch import nn

from sentei.axes.connections import Config
from sentei.axes.rank import Config as Rank
from sentei.conversion import adapter_files, adapters, export
from sentei.conversion.plan import Plan, convert
from sentei.core.rules import Threshold

TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}{% endfor %}"
C = "config.json"


def config(**changes):
    """Keys of config.json."""
    return at(C, keys(**changes))


CONFIG = Door(
    name="config.json",
    make=model,
    open=open_model,
    attacks={
        **{f"cut to {keep:.0%}": at(C, cut(keep)) for keep in (0.0, 0.3, 0.9)},
        "a list": at(C, text_of("[]")),
        "a number": at(C, text_of("7")),
        "a pickle": at(C, bytes_of(CANARY)),
        "UTF-16": at(C, lambda path: path.write_bytes(path.read_text().encode("utf-16")) and None),
        "NULs": at(C, bytes_of(bytes(1000))),
        "nested deep": at(C, bytes_of(deep(200_000))),
        "objects nested deep": at(C, bytes_of(deep(100_000, b'{"a":'))),
        "2 MB": at(C, sparse(2 << 20, b"{")),
        "a key twice": at(C, twice("vocab_size")),
        "auto_map": config(auto_map={"AutoModelForCausalLM": "modeling_llama.M"}),
        "auto_map that is empty": config(auto_map={}),
        "trust_remote_code": config(trust_remote_code=True),
        "a private kernel": config(_attn_implementation_internal="attacker/kernel"),
        "a private implementation": config(_attn_implementation="attacker/kernel"),
        "an implementation": config(attn_implementation="attacker/kernel"),
        "a nested configuration": config(text_config={"auto_map": {"AutoConfig": "a.B"}}),
        "a target to instantiate": config(_target_="os.system"),
        "a quantiser": config(unknown_quantiser={"class": "os.system"}),
        "a billion layers": config(num_hidden_layers=1_000_000_000),
        "1,000 layers": config(num_hidden_layers=1000),
        "no layers": config(num_hidden_layers=0),
        "a negative width": config(hidden_size=-64),
        "a width of 1e400": at(
            C,
            lambda path: (
                path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": 1e400')) and None
            ),
        ),
        "a width that is a bool": config(hidden_size=True),
        "a width that is text": config(hidden_size="64"),
        "a vocabulary of 2^22": config(vocab_size=1 << 22),
        "a vocabulary of 2^70": config(vocab_size=1 << 70),
        "heads that do not divide": config(num_attention_heads=3),
        "more key heads than heads": config(num_key_value_heads=8),
        "an epsilon of NaN": config(rms_norm_eps=float("nan")),
        "an epsilon of text": config(rms_norm_eps="import os"),
        "an infinite theta": config(rope_theta=float("inf")),
        "a rotation of an unknown kind": config(rope_parameters={"rope_type": "evil", "rope_theta": 1e4}),
        "an activation that is none": config(hidden_act="__import__"),
        "an activation that is a list": config(hidden_act=["silu"]),
        "a link that leads elsewhere": at(C, moved_out),
        "a link to a device": at(C, link("/dev/zero")),
        "a pipe": at(C, piped),
    },
    twins={
        "as it is": as_it_is,
        "a known key more": config(torch_dtype="float32", transformers_version="9.9.9"),
        "a longer context": config(max_position_embeddings=4096),
        "named by a stranger": config(_name_or_path="\u001b]0;evil\u0007/../../etc"),
    },
)

T, TC = "tokenizer.json", "tokenizer_config.json"


def tokenizer(change: Callable[[dict], object]):
    """Changes tokenizer.json."""
    return at(T, edited(change))


def beside(name: str, content: str):
    """A further file."""
    return lambda path: (path / name).write_text(content) and None


def templated(template: object):
    """A chat template."""
    return at(TC, keys(chat_template=template))


TOKENIZER = Door(
    name="tokenizer",
    make=model,
    open=open_model,
    attacks={
        **{f"cut to {keep:.0%}": at(T, cut(keep)) for keep in (0.0, 0.5, 0.99)},
        "an empty object": at(T, text_of("{}")),
        "a list": at(T, text_of("[]")),
        "a pickle": at(T, bytes_of(CANARY)),
        "nested deep": at(T, bytes_of(deep(200_000))),
        "objects nested deep": at(T, bytes_of(deep(100_000, b'{"a":'))),
        "70 MB": at(T, sparse(70 << 20, b"{")),
        "a string of 60 MB": at(T, bytes_of(b'{"a":"' + "\U0001f600".encode() * (15 << 20) + b'"}')),
        "a bomb of lists": at(T, bytes_of(b'{"a":[' + b"[]," * 1_900_000 + b"0]}")),
        "an unknown model": tokenizer(lambda value: value["model"].update(type="Surprise")),
        "a vocabulary that is a list": tokenizer(lambda value: value["model"].update(vocab=[1, 2])),
        "negative numbers": tokenizer(lambda value: value["model"]["vocab"].update(a=-1)),
        "numbers beyond the model": tokenizer(lambda value: value["model"]["vocab"].update({"a": 4_000_000_000})),
        "merges of nothing": tokenizer(lambda value: value["model"].update(merges=[["evil", "twin"]])),
        "Unigram without a vocabulary": tokenizer(
            lambda value: value.update(model={"type": "Unigram", "vocab": [], "unk_id": 9})
        ),
        "a broken charsmap": tokenizer(
            lambda value: value.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
        ),
        "a charsmap that lies": tokenizer(
            lambda value: value.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="})
        ),
        "a pattern that is none": tokenizer(
            lambda value: value.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
            )
        ),
        "an unknown normaliser": tokenizer(lambda value: value.update(normalizer={"type": "os.system"})),
        "truncation to nothing": tokenizer(
            lambda value: value.update(
                truncation={"max_length": 0, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}
            )
        ),
        "code to run": at(TC, keys(auto_map={"AutoTokenizer": ["a.B", None]})),
        "another file": at(TC, keys(tokenizer_file="/etc/passwd")),
        "another vocabulary": at(TC, keys(vocab_file="/etc/passwd")),
        "a GGUF elsewhere": at(TC, keys(gguf_file="../../x.gguf")),
        "an object": at(TC, keys(tokenizer_object={"a": 1})),
        "another file in the map": beside("special_tokens_map.json", json.dumps({"tokenizer_file": "/etc/passwd"})),
        "another vocabulary in the map": beside("special_tokens_map.json", json.dumps({"vocab_file": "/etc/passwd"})),
        "methods as keys": at(TC, keys(save_pretrained="x")),
        "tokens that are numbers": at(TC, keys(eos_token=7)),
        "a settings file of half": at(TC, cut(0.5)),
        "a settings file nested deep": at(TC, bytes_of(deep(100_000, b'{"a":'))),
        "a template named out of the folder": templated(
            [{"name": "../../../evil", "template": "x"}, {"name": "default", "template": "x"}]
        ),
        "a template named by a path": templated({"/tmp/evil": "x"}),
        "a template that is a number": templated(7),
        "a template of 2 MB": beside("chat_template.jinja", "x" * (2 << 20)),
        "a template of 2 MB in the settings": templated("x" * (2 << 20)),
        "a template that is a link": lambda path: (path / "chat_template.jinja").symlink_to("/etc/passwd"),
        "templates in a folder": lambda path: (path / "additional_chat_templates").mkdir(),
        "generation by code": beside("generation_config.json", json.dumps({"custom_generate": "attacker/code"})),
        "generation settings nested deep": beside("generation_config.json", "[" * 100_000),
        "generation settings that are a list": beside("generation_config.json", "[]"),
        "a link that leads elsewhere": at(T, moved_out),
        "a pipe": at(T, piped),
    },
    twins={
        "as it is": as_it_is,
        "a template that would run": templated(TEMPLATE),
        "two templates": templated([{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]),
        "a template in a file": beside("chat_template.jinja", TEMPLATE),
        "a broken template": beside("chat_template.jinja", "{% for"),
        "a token that is not in the text": tokenizer(
            lambda value: value["added_tokens"].append(value["added_tokens"][0] | {"id": 5_000, "content": "<more>"})
        ),
        "code beside it": beside("tokenization_llama.py", "open('canary', 'w')"),
        "a map of tokens": beside("special_tokens_map.json", json.dumps({"eos_token": "</s>"})),
        "settings of generation": beside("generation_config.json", json.dumps({"eos_token_id": 2, "temperature": 0.6})),
    },
)


def adapter(folder: Path) -> Path:
    """A tiny adapter."""
    base = tiny_model("llama")
    adapters.add(base, ["q_proj", "v_proj"], Rank(rank=4, alpha=8.0))
    for layer in adapters.adapters_of(base).values():
        nn.init.normal_(layer.b)
    adapter_files.write(base, folder / "adapter")
    return folder / "adapter"


def open_adapter(path: Path) -> None:
    """Puts it on the tiny model."""
    adapter_files.load(BASE, path)
    adapters.remove(BASE)


BASE = tiny_model("llama")
AC, AW = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def settings(**changes):
    """Keys of adapter_config.json."""
    return at(AC, keys(**changes))


def poisoned(value: float):
    """One number of one factor."""

    def spoil(path: Path) -> None:
        tensors = load_file(path)
        tensors[A][0, 0] = value
        save_file(tensors, path)

    return at(AW, spoil)


ADAPTER = Door(
    name="adapter",
    make=adapter,
    open=open_adapter,
    attacks={
        **{f"settings cut to {keep:.0%}": at(AC, cut(keep)) for keep in (0.0, 0.5, 0.95)},
        **{f"weights cut to {keep}": at(AW, cut(keep)) for keep in (0, 8, 100, -1)},
        "no settings": at(AC, Path.unlink),
        "no weights": at(AW, Path.unlink),
        "a pickle alone": at(AW, lambda path: path.unlink() or path.with_suffix(".bin").write_bytes(CANARY) and None),
        "settings nested deep": at(AC, bytes_of(deep(100_000, b'{"a":'))),
        "settings of 2 MB": at(AC, sparse(2 << 20, b"{")),
        "settings with a key twice": at(AC, twice("r")),
        "a rank of 10^9": settings(r=1_000_000_000),
        "a rank of -1": settings(r=-1),
        "a rank it does not have": settings(r=5),
        "an infinite alpha": settings(lora_alpha=float("inf")),
        "an alpha of NaN": settings(lora_alpha=float("nan")),
        "a dropout of 1": settings(lora_dropout=1.0),
        "a pattern that never ends": settings(rank_pattern={"(a+)+$": 4}),
        "40,000 patterns": settings(rank_pattern={f"layer{n}": 4 for n in range(40_000)}),
        "patterns that are a list": settings(rank_pattern=["a"]),
        "a pattern of text": settings(alpha_pattern={"q_proj": "8"}),
        "targets that are numbers": settings(target_modules=[1]),
        "targets elsewhere": settings(target_modules=["o_proj"]),
        "NaN": poisoned(float("nan")),
        "infinity": poisoned(float("inf")),
        "another shape of as many bytes": at(AW, headed(lambda header: header[A].update(shape=[2, 128]))),
        "a lone factor": at(AW, lambda path: save_file({A: load_file(path)[A]}, path)),
        "a module that is none": at(
            AW, headed(lambda header: header.update({A.replace("layers.0", "layers.99"): header.pop(A)}))
        ),
        "a module beyond the model": at(
            AW, headed(lambda header: header.update({A.replace("model.layers", "..layers"): header.pop(A)}))
        ),
        "offsets that overlap": at(AW, headed(lambda header: header[A].update(data_offsets=[8, 1032]))),
        "weights that are a link elsewhere": at(AW, moved_out),
        "weights that are a pipe": at(AW, piped),
        "settings that are a link elsewhere": at(AC, moved_out),
    },
    twins={
        "as it is": as_it_is,
        "from somewhere": settings(base_model_name_or_path="../../\u001b[31m"),
        "with patterns": settings(rank_pattern={"q_proj": 4, "v_proj": 4}),
    },
)


def pruned(folder: Path) -> Path:
    """What `sentei prune` writes."""
    path = folder / "pruned"
    dense = tiny_model("llama")
    plan = Plan.everywhere((0, 1), "connections", Config(rule=Threshold(0.1)))
    save_tiny(path, "llama")  # for its tokenizer
    export.export(convert(dense, plan), None, plan, path, tokens=torch.arange(3, 200), facts={})
    return path


def open_pruned(path: Path) -> None:
    """What `sentei verify` and `sentei.load` do before anything is computed."""
    export.read_receipt(path)
    export.load(path)


P, R = "sentei.json", "receipt.safetensors"


def entry(change: Callable[[dict], object]):
    """Changes the first entry of the plan."""
    return at(P, edited(lambda policy: change(policy["plan"][0])))


POLICY = Door(
    name="sentei.json",
    make=pruned,
    open=open_pruned,
    attacks={
        **{f"cut to {keep:.0%}": at(P, cut(keep)) for keep in (0.0, 0.5, 0.95)},
        "none": at(P, Path.unlink),
        "a list": at(P, text_of("[]")),
        "nested deep": at(P, bytes_of(deep(100_000, b'{"plan":'))),
        "a plan nested deep": at(
            P, lambda path: path.write_text(path.read_text().replace('"plan": [', '"plan": ' + "[" * 900, 1)) and None
        ),
        "60 MB": at(P, sparse(60 << 20, b"{")),
        "a key twice": at(P, twice("plan")),
        "another schema": at(P, keys(schema="sentei.policy/2")),
        "another dtype": at(P, keys(dtype="float4")),
        "a dtype that is a list": at(P, keys(dtype=["float32"])),
        "no plan": at(P, edited(lambda policy: policy.pop("plan"))),
        "a plan that is text": at(P, keys(plan="import os")),
        "300,000 entries": at(
            P, edited(lambda policy: policy.update(plan=[{"layer": 0, "room": "x", "config": {}}] * 300_000))
        ),
        "90,000 good entries": at(P, edited(lambda policy: policy.update(plan=policy["plan"] * 45_000))),
        "the same entry twice": at(P, edited(lambda policy: policy["plan"].append(policy["plan"][0]))),
        "layer 999": entry(lambda value: value.update(layer=999)),
        "layer -1": entry(lambda value: value.update(layer=-1)),
        "layer true": entry(lambda value: value.update(layer=True)),
        "an unknown room": entry(lambda value: value.update(room="os.system")),
        "a room that is private": entry(lambda value: value.update(room="__class__")),
        "a room that is a list": entry(lambda value: value.update(room=[])),
        "a key too many": entry(lambda value: value.update(code="import os")),
        "a configuration that is none": entry(lambda value: value.update(config=None)),
        "an unknown rule": entry(lambda value: value["config"].update(rule={"name": "eval"})),
        "a rule of NaN": entry(
            lambda value: value["config"]["rule"].update(
                {key: float("nan") for key in value["config"]["rule"] if key != "name"}
            )
        ),
        "a receipt that is cut": at(R, cut(-1)),
        "a receipt of zeros, 1 GB": at(R, sparse(1 << 30)),
        "a receipt that is a pickle": at(R, bytes_of(CANARY)),
        "a receipt without tokens": at(R, lambda path: save_file({"logits": torch.zeros(8, 320)}, path)),
        "a receipt of texts": at(
            R, lambda path: save_file({"logits": torch.zeros(8, 320), "tokens": torch.zeros(9)}, path)
        ),
        "a receipt of other logits": at(
            R, lambda path: save_file({"logits": torch.zeros(8), "tokens": torch.zeros(9, dtype=torch.int64)}, path)
        ),
        "a receipt without a token": at(
            R,
            lambda path: save_file({"logits": torch.zeros(8, 320), "tokens": torch.zeros(0, dtype=torch.int64)}, path),
        ),
        "tokens beyond the model": at(
            R, lambda path: save_file({"logits": torch.zeros(8, 320), "tokens": torch.full((9,), 9999)}, path)
        ),
        "a receipt that is a link elsewhere": at(R, moved_out),
        "a policy that is a link elsewhere": at(P, moved_out),
        "a policy that is a pipe": at(P, piped),
    },
    twins={
        "as it is": as_it_is,
        "facts of a stranger": at(P, keys(facts={"source": "<script>\u001b[31m"})),
        "threads that are none": at(P, keys(threads=-5)),
        "an empty plan": at(P, keys(plan=[])),
    },
)
