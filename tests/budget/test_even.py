"""Plans that an ordinary checkpoint can hold: the best of them all, by trying every one, and written as such."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from alone import loaded_without_sentei
from tiny import tiny_encoder, tiny_model

from sentei.axes.connections import Config
from sentei.axes.depth import Config as Depth
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget.even import evenly
from sentei.budget.mixture import Market
from sentei.budget.offers import Offer
from sentei.budget.share import drops_connections
from sentei.budget.slack import LayerSlack, Option
from sentei.budget.workload import Prefill
from sentei.conversion.plan import Entry, convert
from sentei.conversion.rungs import may_be_plain, rung_of
from sentei.core.rules import All, Fixed, Threshold, TopK

GONE = Depth(rule=Fixed(()), part="attention"), Depth(rule=Fixed(()), part="network")
THIN = [Weights(rule=TopK(width), saliency="magnitude") for width in (64, 32)]
FEWER = Heads(num_kv_heads=1)
LEADS = ((0, GONE[0]),)  # the first layer's attention cannot go
SLACK = [LayerSlack(layer=number, options=[
    Option(rule=All(), density=[1.0] * 4, error=[0.0] * 4, seconds=0.5),
    Option(rule=Threshold(0.1), density=[0.3] * 4, error=[1e-4] * 4, seconds=0.3)]) for number in range(3)]


def offers(layers: int = 3, without: tuple = (), seed: int = 0) -> list[Offer]:
    """Every option in every layer, of random nats and seconds, but those `without`: layer and configuration."""
    draws = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(layers):
        for room, config in [("depth", each) for each in GONE] + [("weights", each) for each in THIN] + [
                ("heads", FEWER)]:
            nats, seconds = torch.rand(2, generator=draws).tolist()
            part = config.part if room == "depth" else {"weights": "network", "heads": "attention"}[room]
            if (layer, config) not in without:
                found.append(Offer(entry=Entry(layer=layer, room=room, config=config), part=part, nats=nats,
                                   seconds=seconds))
    return found


def of(found: list[Offer], layer: int, *configs) -> list[Offer]:
    return [offer for config in configs for offer in found
            if offer.entry.layer == layer and offer.entry.config == config]


@pytest.mark.parametrize("without", [(), ((1, THIN[0]),), ((0, GONE[0]), (2, FEWER))], ids=["all", "a width", "others"])
@pytest.mark.parametrize("price", [0.3, 1.0, 2.0, 9.0])
def test_nothing_that_a_checkpoint_can_hold_is_worth_more(price, without):
    """Against every way to leave layers out, with every set of options that is the same in those that stay."""
    for seed in range(8):
        found = offers(without=without, seed=seed)

        def worth(offer: Offer) -> float:
            return price * offer.seconds - offer.nats

        every = []
        for gone in product([False, True], repeat=3):
            for configs in product([None, *THIN], [None, FEWER]):
                kit = [config for config in configs if config]
                taken = [of(found, layer, *(GONE if gone[layer] else kit)) for layer in range(3)]
                whole = all(len(each) == (2 if gone[layer] else len(kit)) for layer, each in enumerate(taken))
                common = all(len(of(found, layer, *kit)) == len(kit) for layer in range(3))
                if whole and common and not all(gone):
                    every.append(sum(map(worth, sum(taken, []))))
        told = evenly(found, [0, 1, 2], worth)
        assert sum(worth(offer) for each in told.values() for offer in each) == pytest.approx(max(every))


def test_a_layer_is_left_however_much_leaving_all_out_is_worth():
    told = evenly([offer for offer in offers() if offer.entry.room == "depth"], [0, 1, 2], lambda offer: 1.0)
    assert len([each for each in told.values() if each]) == 2


@pytest.mark.parametrize("plain", [False, True])
def test_the_plans_of_a_market_are_written_as_ordinary_checkpoints_where_that_is_asked(plain):
    market = Market(slack=SLACK, offers=offers(without=LEADS), config=Config(), workload=Prefill(64), rate=1.0,
                    dense=3.0, plain=plain)
    rungs, rooms = set(), set()
    for candidate in market.plans(0.5, {"connections", "depth", "weights", "heads"}, math.inf):
        model = convert(tiny_model("llama"), candidate.plan)
        rungs.add(rung_of(model, candidate.plan))
        rooms |= {entry.room for entry in candidate.plan.standing("in").entries}
    assert (rungs == {"A", "C"}) if plain else "B" in rungs
    assert len(rooms) > 1


def test_rooms_that_no_ordinary_checkpoint_holds():
    llama, bert = tiny_model("llama"), tiny_encoder()
    assert [room for room in ("depth", "weights", "heads", "experts") if may_be_plain(llama, room)] == [
        "depth", "weights", "heads"]
    assert [room for room in ("depth", "weights", "heads", "experts") if may_be_plain(bert, room)] == [
        "depth", "weights"]


def test_prune_writes_a_folder_that_transformers_loads_with_the_receipt_s_outputs(prune, tmp_path, monkeypatch):
    """On offers of which the best for each layer by itself are uneven; connections, which sentei alone chooses, save
    nothing. The folder is read in a process that has no sentei."""
    monkeypatch.setattr("sentei.budget.offers.measure", lambda *_, **__: offers(without=LEADS))
    monkeypatch.setattr("sentei.budget.slack.measure", lambda *_, **__: [replace(layer, options=[
        replace(option, seconds=0.5) for option in layer.options]) for layer in SLACK])
    result = json.loads(prune("--plain", "--json", quality=0.05).stdout)
    policy = json.loads((tmp_path / "out" / "sentei.json").read_text())
    rooms = {entry["room"] for entry in result["plan"]}
    assert policy["rung"] == "A" and rooms & {"weights", "heads", "depth"} and "experts" not in rooms
    assert not any(drops_connections(Entry.from_json(entry)) for entry in policy["plan"])
    told = loaded_without_sentei(tmp_path / "out")
    assert told["difference"] <= 1e-4 and not told["problems"]
    assert told["parameters"] < sum(weight.numel() for weight in tiny_model("llama").parameters())
    assert "--plain" in (tmp_path / "out" / "README.md").read_text()
