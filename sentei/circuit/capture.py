"""Runs a model on a prompt, or on a prompt and what it writes, and keeps what each token used."""

import datetime
import platform
import sys
from collections.abc import Callable

import torch
from torch import nn

from sentei.circuit.observe import Observer
from sentei.circuit.recorder import Facts, Recorder
from sentei.circuit.run import Circuit, Run, Token
from sentei.core.errors import SenteiError
from sentei.core.rules import Mass
from sentei.core.trace_header import MAX_NAME, MAX_TOKENS, OBSERVED, RAN
from sentei.core.tracing import Tap, listening

FOLLOWING = 5  # how many of the likeliest next tokens are told

# From a token's number to its text.
Spell = Callable[[int], str]


def has_rooms(model: nn.Module) -> bool:
    """Whether a trace of the model would hear anything."""
    return any(isinstance(module, Tap) for module in model.modules())


@torch.no_grad()
def capture(model: nn.Module, prompts: list[list[int]], spell: Spell, *, write: int = 0, share: float = 0.9,
            model_name: str = "") -> Circuit:
    """The circuit of one prompt, or of two; a third is the control of the first.

    A model with rooms tells what they kept. A dense model of transformers is observed, and the rule Mass(share) says
    what holds the mass. Prompts of a dense causal model are read at one length, with padding behind the shorter,
    which no token sees: the arithmetic of a shared prefix is then the same to the bit.

    Args:
        model: in eval mode.
        prompts: one to three lists of token numbers.
        spell: from a token's number to its text.
        write: how many tokens the model writes after each, one by one, each the likeliest.
        share: of the mass, for dense models.
        model_name: for the page.
    Raises:
        SenteiError: no prompt, an empty one, one too long, or tokens to be written by an encoder.
        UnsupportedError: a dense model whose attention cannot be observed.
    Cost: a pass over each prompt, and one a token that is written; memory for the shares of one layer at a time.
    """
    facts = Facts.of(model)
    longest = max(map(len, prompts), default=0)
    for holds, got in ((1 <= len(prompts) <= 3, f"{len(prompts)} prompts"),
                       (min(map(len, prompts), default=0) > 0, "an empty one"),
                       (longest + write <= MAX_TOKENS, f"{longest + write} tokens"),
                       (not write or facts.causal, "an encoder that is to write")):
        if not holds:
            raise SenteiError("trace", expected=f"one to three prompts of 1 to {MAX_TOKENS} tokens, and a causal model "
                              "to write more", got=got, do="correct that and try again")
    ran = has_rooms(model)
    runs = tuple(_run(model, facts, prompt, spell, write, None if ran else (share, longest)) for prompt in prompts)
    return Circuit(kind=RAN if ran else OBSERVED, model=(model_name or type(model).__name__)[:MAX_NAME], runs=runs,
                   rule="the rooms of the model" if ran else f"the fewest parts that hold {share:.0%} of the mass",
                   versions=versions(), date=datetime.date.today().isoformat())


def versions() -> dict[str, str]:
    """The versions of what made a trace; the package root is loaded before any of its modules."""
    names = [name for name in ("sentei", "torch", "transformers") if name in sys.modules]
    return {name: sys.modules[name].__version__ for name in names} | {"python": platform.python_version()}


def _run(model: nn.Module, facts: Facts, prompt: list[int], spell: Spell, write: int,
         observe: tuple[float, int] | None) -> Run:
    """One prompt through the model; `observe` is the share, and the length to pad to, of a dense model."""
    if observe is None:
        recorder = Recorder(facts)
        heard = listening(model, Tap, recorder)
    else:
        recorder = Observer(facts, Mass(observe[0]))
        heard = recorder.watching(model)
    padding = 0 if observe is None or write or not facts.causal else observe[1] - len(prompt)
    with heard:
        return _read_and_write(model, recorder, prompt, spell, write, padding)


def _read_and_write(model: nn.Module, recorder: Recorder, prompt: list[int], spell: Spell, write: int, padding: int
                    ) -> Run:
    """The run of a prompt with padding behind it, which is not recorded, and of `write` tokens more."""
    reader, numbers = _Reader(model, keeps=write > 0), list(prompt)
    recorder.call(0, len(prompt))
    scores = reader.read(prompt + prompt[-1:] * padding)
    for _ in range(write):
        numbers.append(int(scores[-1].argmax()))
        recorder.call(len(numbers) - 1, len(numbers))
        scores = reader.read(numbers[-1:])
    following = ()
    if recorder.facts.causal and scores is not None:
        chances = scores[len(prompt) - 1 if padding else -1].float().softmax(-1).topk(min(FOLLOWING, scores.shape[-1]))
        following = tuple(zip(map(spell, chances.indices.tolist()), chances.values.tolist(), strict=True))
    tokens = tuple(Token(id=number, text=spell(number)) for number in numbers)
    return recorder.run(tokens, prompt=len(prompt), following=following)


class _Reader:
    """Calls a model of transformers or of `sentei.model`, and remembers what it has read where `keeps` says so."""

    def __init__(self, model: nn.Module, *, keeps: bool):
        self.model, self.keeps = model, keeps
        self.is_ours = not hasattr(model, "set_attn_implementation")
        self.past = model.cache() if keeps and self.is_ours else None

    def read(self, numbers: list[int]) -> torch.Tensor | None:
        """Logits [T, V] of the tokens, None of a model without."""
        tokens = torch.tensor([numbers], device=next(self.model.parameters()).device)
        if self.is_ours:
            return (self.model(tokens, cache=self.past) if self.keeps else self.model(tokens))[0]
        told = {"past_key_values": self.past, "use_cache": True} if self.keeps else {}
        answer = self.model(input_ids=tokens, **told)
        self.past = getattr(answer, "past_key_values", None) if self.keeps else None
        logits = getattr(answer, "logits", None)
        return None if logits is None else logits[0]
