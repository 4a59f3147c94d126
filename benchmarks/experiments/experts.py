"""Dense against experts at equal training FLOPs: top 1, top 2, and small experts with a shared one.

A byte keeps 192 neurons a layer in every variant, the dense layer's; the experts have 8 times as many to choose from.
Balance losses of 0.01 (Switch); Sigmoid gates move the bias of their choice besides (2408.15664), and their weights add
up to the number of experts kept, so that a layer begins about as large as the dense one.
"""

from benchmarks.experiments.harness import Experiment, Variant, carry_out
from benchmarks.experiments.parts import mixture, transformer
from sentei.axes.experts.gates import Sigmoid, Softmax
from sentei.training.losses import Weights

SHAPE = {"width": 96, "layers": 2, "heads": (4, 4)}
TEXT = ("code", "prose", "french")
FEED_FORWARDS = {
    "dense": (192, "192 neurons"),
    "top 1": (mixture(8, 1, 192, Softmax()), "8 x 192, softmax gate (Switch)"),
    "top 2": (mixture(16, 2, 96, Sigmoid(scale=2.0, speed=2e-3)), "16 x 96, sigmoid gate"),
    "fine and shared": (mixture(31, 3, 48, Sigmoid(scale=3.0, speed=2e-3), shared=1),
                        "31 x 48, top 3, and 1 x 48 shared"),
}


def variant(feed_forward: object, about: str) -> Variant:
    """The model with this feed-forward layer."""
    balance = Weights() if isinstance(feed_forward, int) else Weights(switch=0.01)
    return Variant(make=lambda: transformer(**SHAPE, feed_forward=feed_forward), about=about, balance=balance)


EXPERIMENT = Experiment(name="experts", text=TEXT, flops=1.25e12, seeds=3,
                        variants={name: variant(*given) for name, given in FEED_FORWARDS.items()})


if __name__ == "__main__":
    carry_out(EXPERIMENT, __doc__)
