"""What a plan does to a model, in words: every room that drops something is told, with its numbers, and no other."""

import pytest

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.experts import Config as Experts
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.conversion.deeds import CLAUSES, NATIVE, deeds, share
from sentei.conversion.plan import Entry
from sentei.conversion.rooms import WAYS
from sentei.core.rules import Fixed, Threshold, TopK


def kept(room: str, *each: tuple[object, float]) -> list[tuple[Entry, float]]:
    return [(Entry(layer=layer, room=room, config=config), density) for layer, (config, density) in enumerate(each)]


CHOOSING = Connections(rule=Threshold(0.1))
THIN = Weights(rule=TopK(64))
ROOMS = {
    "connections": (kept("connections", (Connections(), 1.0), (CHOOSING, 0.5), (CHOOSING, 0.2)),
                    "attention computes 35 % of its connections in 2 of 30 layers, chosen for each input"),
    "weights": (kept("weights", (THIN, 0.75), (THIN, 0.875), (THIN, 0.75)),
                "feed-forward networks keep 75 % to 88 % of their neurons in 3 of 30 layers, whatever the token"),
    "experts": (kept("experts", (Experts(rule=TopK(64), unit=1), 0.25)),
                "a token computes 25 % of the feed-forward neurons in 1 of 30 layers, chosen for each token"),
    "heads": (kept("heads", (Heads(num_kv_heads=3), 0.8), (Heads(num_kv_heads=1), 0.6)),
              "key/value heads are merged into 1 or 3 in 2 of 30 layers"),
    "depth": (kept("depth", *((Depth(rule=Fixed(()), part=part), 0.0) for part in (
        "network", "block", "network", "attention"))), "1 of 30 layers, the attention of 1 of 30 layers, "
        "the feed-forward network of 2 of 30 layers are left out"),
}


@pytest.mark.parametrize("room", WAYS)
def test_each_room_is_told_with_its_numbers_and_no_other(room):
    entries, told = ROOMS[room]
    assert deeds(entries, 30, "rule") == [told, NATIVE]


def test_all_rooms_of_a_plan_are_told():
    assert set(CLAUSES) == set(WAYS)
    told = deeds([entry for entries, _ in ROOMS.values() for entry in entries], 30, "rule")
    assert sorted(told) == sorted([*(words for _, words in ROOMS.values()), NATIVE])


def test_of_decoding_what_a_written_token_reads_is_told():
    entries = kept("connections", (Connections(decode=Threshold(0.1)), 0.004))
    assert deeds(entries, 2, "decode")[0] == \
        "a written token reads under 1 % of the keys and values in 1 of 2 layers, chosen for each input"


def test_where_nothing_is_dropped_that_is_said():
    assert deeds([], 3, "rule") == ["nothing is changed"]
    told = deeds(kept("connections", (Connections(), 1.0)), 3, "rule")
    assert told[0] == "nothing is left out" and told[1].startswith("every layer runs in sentei's own kernels")


@pytest.mark.parametrize("value, words", [(0.0, "0 %"), (0.001, "under 1 %"), (0.334, "33 %"), (1.0, "100 %")])
def test_a_share_in_words(value, words):
    assert share(value) == words
