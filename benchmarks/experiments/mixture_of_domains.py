"""A mixture of experts of 10 million parameters on code, prose and French, and its dense twin at equal training FLOPs.

32 experts of 128 neurons a layer, of which a byte keeps two, against a dense layer of 256; everything else is the
same. Sigmoid gates with a bias for the choice alone (2408.15664) and a weak balance loss. Load, dead experts and
specialisation are those of the held-out windows, by `sentei/measurement/specialisation.py`: "information" is what the
domain of a window tells of an expert that one of its bytes keeps, and chance is what shuffled domains tell.
"""



from benchmarks.experiments.harness import Experiment, Variant, arguments, trained
from benchmarks.experiments.parts import balance, biases, mixture
from sentei.axes.experts.gates import Sigmoid
from sentei.model import Config, Transformer
from sentei.training.loop import Config as Training
from sentei.training.loop import Optimizer

SHAPE = {"width": 192, "layers": 4, "heads": (6, 6)}
DOMAINS = ("code", "prose", "french")
ROUTED = mixture(32, 2, 128, Sigmoid(speed=2e-3))
EXPERIMENT = Experiment(
    name="mixture-of-domains", text=DOMAINS, flops=50e12, seeds=1, held_out=192,
    variants={"dense": Variant(make=lambda: Transformer(Config(**SHAPE, feed_forward=256)), about="256 neurons"),
              "experts": Variant(make=lambda: Transformer(Config(**SHAPE, feed_forward=ROUTED)),
                                 about="32 x 128, top 2", terms=(balance(switch=0.003), biases))},
    training=Training(batch=16, evaluate=100, save=50, optimizer=Optimizer(rate=3e-3, warmup=50)))


def main() -> None:
    """Trains both."""
    place, _ = arguments(__doc__)
    for name in ("experts", "dense"):
        trained(EXPERIMENT, name, 0, place)


if __name__ == "__main__":
    main()
