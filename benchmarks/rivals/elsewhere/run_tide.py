"""tide-inference decodes: python run_tide.py MODEL WINDOWS MODE CALIBRATION OUT.

It knows nothing of sentei. The package fetches its calibration text from a hub, and where it gets none trains its
routers on one sentence said two thousand times; here it is given the text that all rivals have. All its settings are
its defaults. MODE and OUT are those of run_economize.py; losses are of `engine(tokens)`, seconds of `engine.generate`.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import TIDE
import TIDE.calibrate
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

STEPS, RUNS, PIECE = 32, 3, 256

folder, windows, mode, calibration, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = load_file(windows)["tokens"]
texts = [tokenizer.decode(part) for row in load_file(calibration)["tokens"] for part in row.split(PIECE)]
sys.modules["TIDE.calibrate"]._load_calibration_texts = lambda name, number: texts
with tempfile.TemporaryDirectory() as place:
    router = Path(place) / "router.pt"
    sys.modules["TIDE.calibrate"].calibrate(model, tokenizer, save_path=str(router))
    engine = TIDE.TIDE(model, router_path=str(router))


def decoded(steps):
    """Seconds of `generate` with so many steps, and how many it made."""
    start = time.perf_counter()
    engine.generate(rows[:1, :-STEPS], max_new_tokens=steps, temperature=0)
    return time.perf_counter() - start, engine.last_stats.total_tokens


@torch.no_grad()
def dense_seconds():
    """Of transformers' own loop, a step."""
    cache, row = DynamicCache(config=model.config), rows[0]
    model(input_ids=row[None, :-STEPS], past_key_values=cache, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for token in row[-STEPS:].split(1):
        logits = model(input_ids=token[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
    return (time.perf_counter() - start) / STEPS


if mode == "losses":
    half, found, exits = rows.shape[1] - rows.shape[1] // 2, {"losses": []}, []
    for row in rows:
        logits = engine(row[None])[0, half:-1].float()
        found["losses"].append(torch.nn.functional.cross_entropy(logits, row[half + 1:], reduction="none").tolist())
        exits.append(dict(engine.last_stats.exits_per_layer))
    found["exits"] = exits
else:
    found = {"dense": [], "pruned": []}
    for number in range(RUNS + 1):
        plain, (before, _), (all_of_it, made) = dense_seconds(), decoded(0), decoded(STEPS)
        if number:
            found["dense"].append(plain)
            found["pruned"].append((all_of_it - before) / made)
with open(out, "w", encoding="utf-8") as file:
    json.dump({**found, "package": f"tide-inference {version('tide-inference')}"}, file)
