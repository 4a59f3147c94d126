"""economize decodes: python run_economize.py MODEL WINDOWS MODE SETTING OUT.

It knows nothing of sentei. SETTING is "softmax 0.9" or the like: CALM, the package's early exit that needs no training,
with a confidence of its own and a threshold. Everything goes through the package's own decoding loop; a selector gives
it the text's next token instead of the likeliest, and notes what that token's loss was and when it was asked.

MODE "losses": of the second half of every window. MODE "seconds": of the last STEPS tokens of the first window, beside
transformers' own loop in the same process, in turn. OUT is JSON.
"""

import json
import sys
import time

import economize
import torch
from economize.techniques.dynamic_depth import CalmConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

STEPS, RUNS = 32, 3


class Told:
    """A token selector that says what the text says."""

    def __init__(self, tokens):
        self.tokens, self.place, self.losses, self.moments = tokens, 0, [], []

    def __call__(self, logits, history):
        """The next token of the text."""
        token = int(self.tokens[self.place])
        self.moments.append(time.perf_counter())
        if self.place:
            self.losses.append(float(-logits.float().log_softmax(-1)[token]) if NOTES else 0.0)
        self.place += 1
        return token


def told(model, row, prompt):
    """The model decodes what comes after `prompt` tokens of a row."""
    selector = Told(row[prompt:])
    model.decode(row[:prompt], len(row) - prompt, selector=selector)
    return selector


def dense_seconds(base, row, prompt):
    """Of transformers' own loop over the same tokens."""
    cache = DynamicCache(config=base.config)
    base(input_ids=row[None, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for token in row[prompt:-1].split(1):
        logits = base(input_ids=token[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
    return time.perf_counter() - start


folder, windows, mode, setting, out = sys.argv[1:]
NOTES = mode == "losses"
torch.set_grad_enabled(False)
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
rows = load_file(windows)["tokens"]
confidence, threshold = setting.split()
model = economize.apply(base, CalmConfig(confidence=confidence, threshold=float(threshold)))
if NOTES:
    half = rows.shape[1] - rows.shape[1] // 2
    found = {"losses": [told(model, row, half).losses for row in rows]}
else:
    row, prompt = rows[0], rows.shape[1] - STEPS - 1
    found = {"dense": [], "pruned": []}
    for number in range(RUNS + 1):
        plain = dense_seconds(base, row, prompt)
        moments = told(model, row, prompt).moments
        if number:
            found["dense"].append(plain)
            found["pruned"].append(moments[-1] - moments[0])
with open(out, "w", encoding="utf-8") as file:
    json.dump({**found, "package": f"economize {economize.__version__}"}, file)
