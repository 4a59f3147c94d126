"""Claim 3: after the softmax only a part of the connections matters.

    share = (the fewest keys that hold 90, 95 or 99 % of a query's attention) ÷ (the keys it sees)

In the default model on the interpreter's documentation, for the last ROWS queries up to each length of context, by
layer and head. The null is attention that is even: it needs 90 % of the keys for 90 % of the mass. Intervals are
Student's t over windows, which are far apart in the text.
Source: the lecture, "from full connection to selective cutting".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sentei.geometry.intervals import mean_interval
from sentei.geometry.mass import fewest
from sentei.lab.finding import Finding, measured
from sentei.lab.subject import default_model, windows
from sentei.measurement.charts import Chart, Series

CLAIM = ("After the softmax only a part of the connections matters: less than half of the keys hold 90 % of the mass, "
         "and a smaller share the longer the context.")
CONTEXTS = (128, 256, 512, 1024)
MASSES = (0.9, 0.95, 0.99)
WINDOWS, ROWS = 4, 16
# From a length of context to the attention of its last rows, [layers, H, ROWS, keys], of one window.
Shares = Iterator[tuple[int, torch.Tensor]]


def measure(contexts: tuple[int, ...] = CONTEXTS, number: int = WINDOWS,
            shares: Callable[[torch.Tensor, tuple[int, ...]], Shares] | None = None) -> Finding:
    """Reads windows of text and counts keys.

    Args:
        contexts: ascending numbers of tokens.
        number: windows, at least two.
        shares: of a window and the contexts; by default those of the default model.
    Cost: a pass of the longest context in eager attention a window, five seconds each.
    """
    texts = windows(contexts[-1], number) if shares is None else [None] * number
    found: dict[tuple[int, float], list[torch.Tensor]] = {}
    for text in texts:
        for size, part in (of_default if shares is None else shares)(text, contexts):
            seen = torch.arange(size - part.shape[-2] + 1, size + 1)
            for mass, keys in zip(MASSES, fewest(part, MASSES), strict=True):
                found.setdefault((size, mass), []).append((keys / seen).mean(-1))
    return judge({key: torch.stack(parts) for key, parts in found.items()})


def judge(found: dict[tuple[int, float], torch.Tensor]) -> Finding:
    """The finding of shares [windows, layers, H] by context and mass."""
    contexts = sorted({size for size, _ in found})
    means = {key: mean_interval(part.mean((1, 2)).tolist()) for key, part in found.items()}
    last, first = found[contexts[-1], MASSES[0]], found[contexts[0], MASSES[0]]
    fall = mean_interval((last.mean((1, 2)) / first.mean((1, 2))).tolist())
    checks = (measured(f"the share of keys that holds {MASSES[0]:.0%} at {contexts[-1]:,} tokens, mean over heads, is",
                       means[contexts[-1], MASSES[0]], most=0.5),
              measured(f"that share ÷ the one at {contexts[0]:,} tokens is", fall, most=1))
    rows = []
    for size in contexts:
        for mass in MASSES:
            heads = found[size, mass].mean(0).flatten()
            mean, low, high = means[size, mass]
            rows.append({"keys": size, "mass": f"{mass:.0%}", "share of keys": mean, "low": low, "high": high,
                         "median head": heads.median().item(), "narrowest head": heads.min().item(),
                         "widest head": heads.max().item(), "heads above half": int((heads > 0.5).sum()),
                         "heads": len(heads)})
    x = tuple(map(float, contexts))
    series = [Series(name=f"{mass:.0%} of the mass", x=x, y=tuple(means[size, mass][0] for size in contexts),
                     low=tuple(means[size, mass][1] for size in contexts),
                     high=tuple(means[size, mass][2] for size in contexts)) for mass in MASSES]
    series.append(Series(name="90%, were it even", x=x, y=(0.9,) * len(x), expected=True))
    chart = Chart(title="The share of keys that holds the mass, mean over heads, with 95 % intervals over windows.",
                  x="keys", y="share of keys", log_x=True, series=tuple(series))
    by_layer = last.mean((0, 2))
    return Finding(claim=CLAIM, rows=tuple(rows), checks=checks, charts=(chart,), heat=tuple(
        map(tuple, last.mean(0).tolist())), notes=(
        f"The map shows the share for {MASSES[0]:.0%} at {contexts[-1]:,} tokens: widest in layer "
        f"{int(by_layer.argmax())} ({by_layer.max():.2f}), narrowest in layer {int(by_layer.argmin())} "
        f"({by_layer.min():.3f}).",))


@torch.no_grad()
def of_default(window: torch.Tensor, contexts: tuple[int, ...]) -> Shares:
    """The default model's attention of the last ROWS queries up to each context, of one pass over the longest."""
    model, _, _ = default_model()
    parts: dict[int, list[torch.Tensor]] = {size: [] for size in contexts}
    with eager(model):
        def keep(module, given, output):
            for size, layers in parts.items():
                layers.append(output[1][0, :, size - ROWS:size, :size].clone())
        handles = [layer.self_attn.register_forward_hook(keep) for layer in model.get_decoder().layers]
        model.get_decoder()(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
    for size, layers in parts.items():
        yield size, torch.stack(layers)


@contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """A block in which transformers' own attention makes its shares, which only its slowest kind does."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
