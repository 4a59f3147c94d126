"""All doors by which a file comes in."""

from attacks.on_rungs import RUNGS
from attacks.on_runs import OUT, TEXT, TRACE
from attacks.on_settings import ADAPTER, CONFIG, POLICY, TOKENIZER
from attacks.on_training import CHECKPOINT, TOKENS, TRAINED, YAML
from attacks.on_weights import GGUF, SAFETENSORS, SHARDS

DOORS = (SAFETENSORS, SHARDS, GGUF, CONFIG, TOKENIZER, ADAPTER, POLICY, RUNGS,
         YAML, CHECKPOINT, TRAINED, TOKENS, TRACE, TEXT, OUT)
