"""Soft MoE in an encoder that fills in hidden bytes, at equal training FLOPs: dense, top 2, expert choice and soft.

Soft MoE and expert choice look at the whole sequence, so they cannot predict the next byte. Here a quarter of the bytes
is hidden and predicted from all others. Losses are a mean over all bytes, of which the given ones count 0: four times
as many are nats a hidden byte. Soft MoE has as many slots as a sequence has bytes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.experiments.harness import Experiment, Variant, carry_out
from benchmarks.experiments.parts import mixture, transformer
from sentei.axes.experts.gates import Sigmoid, Soft, Softmax
from sentei.core.rules import All, Capacity
from sentei.model import Transformer
from sentei.training.losses import Weights

SHAPE = {"vocabulary": 258, "width": 96, "layers": 2, "heads": (4, 4), "causal": False}
HIDDEN, SHARE, SURE = 257, 0.25, 30.0
FEED_FORWARDS = {
    "dense": (192, "192 neurons"),
    "top 2": (mixture(16, 2, 96, Sigmoid(scale=2.0, speed=2e-3)), "16 x 96, sigmoid gate"),
    "expert choice": (mixture(16, Capacity(0.125), 96, Softmax()), "16 x 96, each keeps an eighth of the bytes"),
    "soft": (mixture(16, All(), 192, Soft(slots=16)), "16 x 192, 16 slots each"),
}


class FillsIn(nn.Module):
    """An encoder as a model of the next byte: a byte that was hidden is predicted, one that was not is known.

    tokens [B, T] → logits [B, T, V] for the byte after each, as training wants them. The encoder reads the tokens, some
    hidden, and a hidden one behind the last; what it says of byte t + 1 stands at t. In evaluation the same places are
    hidden every time.
    """

    def __init__(self, inner: Transformer):
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits."""
        drawn = torch.rand(tokens.shape, generator=None if self.training else torch.Generator().manual_seed(0))
        read = F.pad(tokens.masked_fill(drawn < SHARE, HIDDEN), (0, 1), value=HIDDEN)
        known = F.one_hot(F.pad(tokens, (0, 1)), SHAPE["vocabulary"])[:, 1:] * SURE
        return torch.where((read[:, 1:] == HIDDEN)[..., None], self.inner(read)[:, 1:], known)


def variant(feed_forward: object, about: str) -> Variant:
    """The encoder with this feed-forward layer."""
    balance = Weights(switch=0.01) if about.endswith("sigmoid gate") else Weights()
    return Variant(make=lambda: FillsIn(transformer(**SHAPE, feed_forward=feed_forward)), about=about, balance=balance)


EXPERIMENT = Experiment(name="soft", text=("code", "prose", "french"), flops=1.0e12, seeds=2,
                        variants={name: variant(*given) for name, given in FEED_FORWARDS.items()})


if __name__ == "__main__":
    carry_out(EXPERIMENT, __doc__)
