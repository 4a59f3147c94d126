"""A small transformer with one slot a room, and what may stand in the slots."""

from sentei.model.slots import Routed, Slot
from sentei.model.transformer import Config, Transformer, draw

__all__ = ["Config", "Routed", "Slot", "Transformer", "draw"]
