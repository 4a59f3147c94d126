"""anee opens a model: python run_anee.py MODEL. It knows nothing of sentei; how it ends is the result."""

import sys

import torch
from ANEE import ANEEConfig, ANEEWrapper

wrapper = ANEEWrapper(ANEEConfig(model_name=sys.argv[1]))
result = wrapper(torch.arange(8)[None], energy_budget=0.5)
print(result["stats"])
