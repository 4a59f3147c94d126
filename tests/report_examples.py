"""A small result and its details, as a report is made of them."""

from html.parser import HTMLParser

from sentei.measurement.quality import PERPLEXITY

RULES = [{"name": "mass", "mass": mass} for mass in (0.99, 0.9, 0.7)]


def point(name: str, quality: float, speedup: float, speed: str = "foreseen", **more) -> dict:
    return {"name": name, "rooms": ["depth", "weights"], "quality": quality, "speedup": speedup, "speed": speed,
            "text": {"foreseen": "choose", "measured": "verify"}[speed], "density": 0.1, "chosen": False, **more}


def sample(layers: int = 4, heads: int = 3, unpruned: tuple[int, ...] = (1,), **changes) -> tuple[dict, dict]:
    """A small result and its details; `changes` replaces keys of either."""
    rows = [None if layer in unpruned else [round((layer + head + 1) / (layers + heads), 3) for head in range(heads)]
            for layer in range(layers)]
    slack = [{"layer": layer, "options": [
        {"rule": rule, "density": [0.9 - 0.3 * step] * heads,
         "error": [0.001 * 10 ** step * (1 + head) for head in range(heads)]} for step, rule in enumerate(RULES)]}
             for layer in range(layers) if layer not in unpruned]
    result = {
        "schema": "sentei.prune/1", "model": "SmolLM2-135M-Instruct", "workload": "prefill:4096", "dtype": "float32",
        "threads": 2, "dense": {"perplexity": 14.82, "seconds": 3.91, "tokens_per_second": 1047.0},
        "pruned": {"perplexity": 14.95, "seconds": 3.23, "tokens_per_second": 1268.0},
        "speedup": 1.21, "quality": 0.9912, "density": 0.41, "out": "out",
        "plan": [{"layer": layer, "room": "connections", "option": "mass", "rule": RULES[1],
                  "density": sum(row) / heads} for layer, row in enumerate(rows) if row],
        "does": ["attention computes less"],
        "frontier": [point(f"plan {n}", 1 - 0.004 * n, 1 + 0.1 * n, density=1 - 0.2 * n, chosen=n == 2)
                     for n in range(4)] + [point("awful", 0.3, 1.6), point("beside", 0.99, 1.05, speed="measured"),
                                           point("plan 2", 0.9912, 1.21, speed="measured", chosen=True)],
    }
    details = {
        "meaning": PERPLEXITY.meaning,
        "goal": {"quality": 0.99}, "met": True, "reason": "", "quality_interval": [0.9897, 0.9925],
        "speedup_interval": [1.19, 1.23], "text": {"name": "topics", "sha256": "ab" * 32,
                                                   "tokens": {"calibrate": 4096, "choose": 8192, "verify": 8192}},
        "source": "a folder", "slack": slack, "density": rows,
        "timings": {"dense": [3.9, 3.92, 3.91], "pruned": [3.22, 3.24, 3.23]}, "environment": {"torch": "2.13.0"},
        "command": "sentei prune --workload prefill:4096", "date": "2026-03-02",
        "seconds": {"load": 4.0, "slack": 80.0},
    }
    assert set(changes) <= set(result) | set(details)
    for key, value in changes.items():
        (details if key in details else result)[key] = value
    return result, details


class Outline(HTMLParser):
    """Every tag with the names of its attributes, in order, and the text between them."""

    VOID = {"meta", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
