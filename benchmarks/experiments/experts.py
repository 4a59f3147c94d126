"""Dense against experts at equal training FLOPs: top 1, top 2, and small experts with a shared one.

A byte keeps 256 neurons a layer in every variant, the dense layer's; the experts have 8 times as many to choose from.
Balance losses of 0.01 (Switch); Sigmoid gates move the bias of their choice besides (2408.15664).
"""

from benchmarks.experiments.harness import Experiment, Variant, arguments, publish, results
from benchmarks.experiments.parts import balance, biases, mixture, transformer
from sentei.axes.experts.gates import Sigmoid, Softmax

SHAPE = {"width": 128, "layers": 3, "heads": (4, 4)}
TEXT = ("code", "prose", "french")
FEED_FORWARDS = {
    "dense": (256, "256 neurons"),
    "top 1": (mixture(8, 1, 256, Softmax()), "8 x 256, softmax gate (Switch)"),
    "top 2": (mixture(16, 2, 128, Sigmoid(speed=2e-3)), "16 x 128, sigmoid gate"),
    "fine and shared": (mixture(31, 3, 64, Sigmoid(speed=2e-3), shared=1), "31 x 64, top 3, and 1 x 64 shared"),
}


def variant(feed_forward: object, about: str) -> Variant:
    """The model with this feed-forward layer."""
    terms = () if isinstance(feed_forward, int) else (balance(switch=0.01), biases)
    return Variant(make=lambda: transformer(**SHAPE, feed_forward=feed_forward), about=about, terms=terms)


EXPERIMENT = Experiment(name="experts", text=TEXT, flops=2.6e12, seeds=3,
                        variants={name: variant(*given) for name, given in FEED_FORWARDS.items()})


def main() -> None:
    """Trains what is not trained, and writes the page."""
    place, _ = arguments(__doc__)
    publish(EXPERIMENT, __doc__, list(results(EXPERIMENT, place)), [])


if __name__ == "__main__":
    main()
