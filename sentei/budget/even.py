"""Choices that an ordinary checkpoint can hold: layers alike, or gone whole (rung A, see `sentei.conversion.rungs`).

transformers' configuration has one number for the width of every network and one for the key/value heads of every
attention. So instead of the best option of each layer by itself, each set of options that all layers have is tried, and
in each layer it is left in or the whole layer is left out, whichever is worth more: exact, as sets are few.
"""

from collections.abc import Callable
from itertools import product

from sentei.budget.offers import Offer

# Rooms whose option must be the same in every layer that is left.
ALIKE = ("weights", "heads")
PARTS = ("attention", "network")


def evenly(offers: list[Offer], layers: list[int], worth: Callable[[Offer], float]) -> dict[int, list[Offer]]:
    """What is worth most together, by layer; nothing of a layer that is not among the keys.

    Args:
        offers: those that may be taken.
        layers: all of the model's.
        worth: of an offer, in nats.
    """
    found = {(offer.entry.layer, offer.entry.room, offer.entry.config): offer for offer in offers}
    whole = {layer: [offer for offer in offers if offer.entry.room == "depth" and offer.entry.layer == layer]
             for layer in layers}
    whole = {layer: both for layer, both in whole.items() if sorted(offer.part for offer in both) == sorted(PARTS)}
    best, most = {}, 0.0
    for kit in _kits(offers, layers):
        kept = {layer: [found[layer, *option] for option in kit] for layer in layers}
        gain = {layer: sum(map(worth, both)) - sum(map(worth, kept[layer])) for layer, both in whole.items()}
        gone = [layer for layer in sorted(gain, key=gain.get) if gain[layer] > 0]
        gone = gone[1:] if len(gone) == len(layers) else gone  # one is left
        taken = kept | {layer: whole[layer] for layer in gone}
        total = sum(worth(offer) for each in taken.values() for offer in each)
        if total > most:
            best, most = taken, total
    return best


def _kits(offers: list[Offer], layers: list[int]) -> list[tuple]:
    """Every set of options, room and configuration, at most one a room, that all layers have."""
    having: dict[tuple, set[int]] = {}
    for offer in offers:
        having.setdefault((offer.entry.room, offer.entry.config), set()).add(offer.entry.layer)
    common = [option for option, those in having.items() if those == set(layers)]
    choices = [[None, *(option for option in common if option[0] == room)] for room in ALIKE]
    return [tuple(filter(None, chosen)) for chosen in product(*choices)]
