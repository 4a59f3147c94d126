"""The claims: which there are, and which of them a command line means. Nothing heavy is imported for it."""

from sentei.core.errors import SenteiError

EVERY = "all"
# The lecture's claims, in its order; each is a module beside this one with CLAIM and measure().
CLAIMS = {
    "orthogonality": "orthogonality",
    "snr": "snr",
    "attention-mass": "attention_mass",
    "one-structure": "one_structure",
    "routing-neighbours": "routing_neighbours",
    "expert-cost": "expert_cost",
    "expert-subspaces": "expert_subspaces",
    "savings": "savings",
    "topk-timing": "topk_timing",
    "contexts": "contexts",
    "dynamic-vs-static": "dynamic_vs_static",
}


def chosen(names: list[str]) -> list[str]:
    """The claims that `names` mean.

    Raises:
        SenteiError: an unknown one.
    """
    unknown = [name for name in names if name not in CLAIMS and name != EVERY]
    if unknown or not names:
        raise SenteiError("lab", expected=f"{EVERY}, or some of {', '.join(CLAIMS)}", got=", ".join(unknown) or "none",
                          do="choose some of these")
    return [name for name in CLAIMS if name in names or EVERY in names]
