"""What a plan does to a model, in plain words: a clause a room, with what was measured of it."""

from collections import Counter

from sentei.conversion.plan import Entry

# What is not a room's doing, and goes with every plan that has an entry.
NATIVE = "what is left runs in sentei's own kernels where they are faster here, with the same results but for rounding"

Kept = list[tuple[Entry, float]]


def deeds(kept: Kept, layers: int, lever: str) -> list[str]:
    """A clause for every room of a plan that drops anything, and NATIVE; of the empty plan that nothing is changed.

    Args:
        kept: the plan's entries, each with its density: the share that is kept of the connections (measured), of the
            weights, or of the neurons that a token computes.
        layers: how many the model has, whatever is left of them.
        lever: of the workload: "rule", or "decode" where tokens are written.
    """
    found = [] if kept else ["nothing is changed"]
    for room, clause in CLAUSES.items():
        mine = [(entry, density) for entry, density in kept if entry.room == room and density < 1]
        if mine:
            found.append(clause(mine, layers, lever))
    if kept:
        found += [NATIVE] if found else ["nothing is left out", NATIVE.replace("what is left", "every layer")]
    return found


def _connections(kept: Kept, layers: int, lever: str) -> str:
    where, mean = _where(kept, layers), sum(density for _, density in kept) / len(kept)
    what = "a written token reads {} of the keys and values" if lever == "decode" else \
        "attention computes {} of its connections"
    return f"{what.format(share(mean))} {where}, chosen for each input"


def _weights(kept: Kept, layers: int, lever: str) -> str:
    return f"feed-forward networks keep {_shares(kept)} of their neurons {_where(kept, layers)}, whatever the token"


def _experts(kept: Kept, layers: int, lever: str) -> str:
    return f"a token computes {_shares(kept)} of the feed-forward neurons {_where(kept, layers)}, chosen for each token"


def _heads(kept: Kept, layers: int, lever: str) -> str:
    numbers = sorted({entry.config.num_kv_heads for entry, _ in kept})
    return f"key/value heads are merged into {' or '.join(map(str, numbers))} {_where(kept, layers)}"


def _depth(kept: Kept, layers: int, lever: str) -> str:
    names = {"block": "", "attention": "the attention of ", "network": "the feed-forward network of "}
    counts = Counter(entry.config.part for entry, _ in kept)
    gone = [f"{name}{counts[part]} of {layers} layers" for part, name in names.items() if counts[part]]
    return f"{', '.join(gone)} {'is' if len(kept) == 1 else 'are'} left out"


CLAUSES = {"connections": _connections, "experts": _experts, "weights": _weights, "heads": _heads, "depth": _depth}


def _where(kept: Kept, layers: int) -> str:
    return f"in {len(kept)} of {layers} layers"


def _shares(kept: Kept) -> str:
    """The least and the largest share."""
    shares = [share(each([density for _, density in kept])) for each in (min, max)]
    return " to ".join(dict.fromkeys(shares))


def share(value: float) -> str:
    """0.334 as "33 %"; what is below half a percent, but not nothing, as "under 1 %"."""
    return "under 1 %" if 0 < value < 0.005 else f"{100 * value:.0f} %"
