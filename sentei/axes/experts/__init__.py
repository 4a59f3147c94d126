"""experts: the room, and what it is made of: gates, the router, balance, and the dense layer it may come from."""

from sentei.axes.experts.layer import MixtureOfExperts, from_dense
from sentei.axes.experts.room import Config, Experts

__all__ = ["Config", "Experts", "MixtureOfExperts", "from_dense"]
