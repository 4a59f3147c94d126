"""Attacks on a folder whose layers differ in shape: weights that only sentei's rooms read."""

from pathlib import Path

import torch
from attacks.door import Door, as_it_is, at, edited, headed, keys
from attacks.on_settings import open_pruned
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from sentei.axes.depth import Config as Depth
from sentei.axes.experts import Config as Experts
from sentei.budget.calibration import calibrate
from sentei.conversion import export
from sentei.conversion.plan import Entry, Plan, convert, wanted
from sentei.core.rules import Fixed, TopK

TOKENS = torch.arange(3, 200)
W, P, NETWORK = "model.safetensors", "sentei.json", "model.layers.{}.mlp.{}"
ROWS, SCALE = NETWORK.format(1, "rows"), NETWORK.format(1, "scale")
PLAN = Plan((Entry(layer=1, room="experts", config=Experts(rule=TopK(40), unit=1)),
             Entry(layer=2, room="experts", config=Experts(rule=TopK(3), unit=16, shared=1)),
             Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part="attention"))))


def uneven(folder: Path) -> Path:
    """What `sentei prune` writes of a plan of experts and a layer without attention."""
    dense = tiny_model("llama")
    export.export(convert(dense, PLAN, calibrate(dense, TOKENS[None], wanted(PLAN))), tiny_tokenizer(), PLAN,
                  folder / "pruned", tokens=TOKENS, facts={})
    return folder / "pruned"


def filled(name: str, value: float):
    """One element of one tensor is `value`."""
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        tensors[name].view(-1)[3] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return at(W, spoil)


HELD = {"rows": ROWS, "scale": SCALE, "router": NETWORK.format(2, "router"), "offset": NETWORK.format(2, "offset"),
        "up": NETWORK.format(2, "up")}
RUNGS = Door(
    name="uneven layers",
    make=uneven,
    open=open_pruned,
    attacks={
        **{f"{value} in {name}": filled(tensor, float(value)) for name, tensor in HELD.items()
           for value in ("nan", "inf", "-inf")},
        "no scale": at(W, headed(lambda header: header.pop(SCALE))),
        "rows of another shape": at(W, headed(lambda header: header[ROWS].update(shape=[64, 96]))),
        "rows that are turned": at(W, headed(lambda header: header[ROWS].update(shape=[96 * 64]))),
        "a plan that leaves a layer's network dense": at(P, edited(lambda policy: policy["plan"].pop(0))),
        "a plan with a part less": at(P, edited(lambda policy: policy["plan"].append(
            {**policy["plan"][2], "layer": 2}))),
        "an empty plan": at(P, keys(plan=[])),
    },
    twins={"as it is": as_it_is, "another scale": filled(SCALE, 0.5)},
)
