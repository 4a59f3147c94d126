"""What plain transformers makes of a folder, in a process of its own in which sentei cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
sys.modules["sentei"] = None  # whoever imports it, the model's folder included, fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

receipt = load_file(sys.argv[1] + "/receipt.safetensors")
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
with torch.no_grad():
    logits = model.eval()(input_ids=receipt["tokens"][None], logits_to_keep=len(receipt["logits"])).logits[0]
print(json.dumps({"difference": float((logits - receipt["logits"]).abs().max()),
                  "problems": {name: sorted(map(str, found)) for name, found in info.items() if found},
                  "parameters": sum(weight.numel() for weight in model.parameters())}))
"""


def loaded_without_sentei(folder: Path) -> dict:
    """The largest difference of its logits from the receipt's, what loading complained of, and its parameters."""
    ran = subprocess.run([sys.executable, "-I", "-c", CODE, str(folder)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])
