"""economize reads text by CALM (2207.07061): python run_calm.py MODEL WINDOWS THRESHOLD OUT.

It knows nothing of sentei. A decoded token leaves at the first layer whose prediction is sure enough: the gap between
its two most likely tokens is larger than the threshold. The first half of every window is a prompt, which by the
package's own account runs every layer; the second half is read as if decoded. Of these tokens OUT has the losses and
the mean number of layers that ran.
"""

import json
import sys

import economize
import torch
from economize.runtime import phase
from economize.techniques.dynamic_depth import CalmConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, windows, threshold, out = sys.argv[1:]
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
calm = economize.apply(model, CalmConfig(threshold=float(threshold)))
technique, runner, losses, ran = calm.techniques["calm"], calm.runner, [], []
for row in load_file(windows)["tokens"]:
    cache, policy, half = runner.new_cache(len(row)), technique.layer_policy(), len(row) // 2
    for name, begin, end in (("prefill", 0, half), ("decode", half, len(row) - 1)):
        with phase(name):
            context = runner.context(cache, torch.arange(begin, end)[None])
            states = runner.forward(row[None, begin:end], context, policy=policy).final
    logits = runner.logits(states)[0].float()
    losses.append(torch.nn.functional.cross_entropy(logits, row[half + 1:], reduction="none").tolist())
    counts = policy.meter.summary()["phases"]["decode"]
    ran.append(counts["ran"] / counts["entered"] * len(model.model.layers))
with open(out, "w", encoding="utf-8") as file:
    json.dump({"package": f"economize {economize.__version__}", "losses": losses, "ran": sum(ran) / len(ran)}, file)
