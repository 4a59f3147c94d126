"""A pruned model on disk: plain weights that load anywhere, and beside them `sentei.json`, the policy.

Without sentei the folder is the dense model, or a smaller one (`rungs`). With it, `load` gives the pruned one, and
`receipt.safetensors` holds logits to compare with: the proof is made in a fresh process. A folder of rung B, whose
layers differ in shape, loads with sentei alone: its config.json names no model that transformers knows.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sentei.conversion import cache, native
from sentei.conversion.card import CARD
from sentei.conversion.checkpoints import DTYPES, load_model, locate
from sentei.conversion.families import marked
from sentei.conversion.layers import family_of
from sentei.conversion.model_folder import member
from sentei.conversion.plan import Plan, complete, convert
from sentei.conversion.rungs import plain, reshape, rung_of
from sentei.conversion.tokenizers import require_known
from sentei.core.errors import FileError, RuleError, SenteiError, UnsupportedError, shown
from sentei.core.safetensors_header import read_header
from sentei.core.storage import cannot_write, read_json, sync_folder, write_json

POLICY, RECEIPT = "sentei.json", "receipt.safetensors"
SCHEMA = "sentei.policy/1"
# A fresh process runs the same kernels on the same numbers; another machine may sum in another order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
ROWS = 8
MAX_POLICY_BYTES = 4 << 20
LOGITS, STATES = "logits", "states"  # what a receipt holds beside tokens: of a decoder, and of an encoder
# Dtype and number of dimensions.
RECEIPT_SHAPES = tuple({"tokens": ("I64", 1), name: ("F32", 2)} for name in (LOGITS, STATES))
# ROWS of logits of the largest vocabulary, or of an encoder's states, and tokens.
MAX_RECEIPT_BYTES = 1 << 28


def export(model: nn.Module, tokenizer, plan: Plan, folder: Path, *, tokens: torch.Tensor, facts: dict) -> None:
    """Writes the model, its tokenizer, the policy and the receipt into `folder`, the policy last.

    Args:
        model: converted with `plan`.
        tokenizer: its tokenizer, or None.
        tokens: int64 [T]; the receipt holds the logits of their last ROWS positions, or an encoder's states.
        facts: more for the policy, e.g. where the weights come from; JSON-able.
    Raises:
        ResourceError: the disk is full; files of an earlier export are then still whole.
    Cost: the weights once on disk, beside those of an earlier export until these are whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = folder / ".export"
    dtype, rung = str(model.dtype).removeprefix("torch."), rung_of(model, plan)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        written, left = plain(model, plan) if rung == "A" else (model, plan)
        written.save_pretrained(temporary, save_original_format=rung != "B")  # else the experts as they are stacked
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        name = LOGITS if family_of(model).causal else STATES
        save_file({"tokens": tokens, name: _outputs(model, tokens)}, temporary / RECEIPT)
        _clean_config(temporary / "config.json", marked if rung == "B" else dict)
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for told in (POLICY, CARD):  # of the weights that are about to go
            (folder / told).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(folder / POLICY, {"schema": SCHEMA, "dtype": dtype, "threads": torch.get_num_threads(),
                                 "facts": facts, "rung": rung, "plan": left.to_json()})


def load(folder: str | Path) -> nn.Module:
    """The pruned model in a folder written by `sentei prune`: an ordinary transformers model, in eval mode.

    Its layers run natively where faster, as when it was measured; of a folder in which nothing was pruned none do.

    Raises:
        FileError: the folder, its policy or its weights are missing, malformed or not to be trusted.
        UnsupportedError: the model's family is not supported.
    """
    policy = read_policy(Path(folder))
    plan = Plan.from_json(policy["plan"])
    checkpoint = locate(str(Path(folder).absolute()))
    uneven = partial(reshape, plan=plan) if plan.choosing(checkpoint.family, those=False).entries else None
    model = load_model(checkpoint, policy["dtype"], uneven)
    try:
        return complete(model, plan) if plan.entries or policy.get("rung") == "A" else convert(model, plan)
    except (RuleError, UnsupportedError) as error:  # it does not fit the model: a layer or a head that is not there
        raise FileError(str(Path(folder) / POLICY), expected=error.expected, got=error.got,
                        do="write the folder again with sentei prune") from error


def read_policy(folder: Path) -> dict:
    """The checked contents of `sentei.json`.

    Raises:
        FileError: not there, or not a policy this version understands.
    """
    path = member(folder, POLICY, required=False)
    if path is None:
        raise FileError(str(folder), expected=f"a folder that sentei prune has written, with {POLICY}",
                        got="none there", do="check the path, or write one with sentei prune --out")
    policy = read_json(path, MAX_POLICY_BYTES)
    if policy.get("schema") != SCHEMA or policy.get("dtype") not in list(DTYPES) or "plan" not in policy:
        raise FileError(str(folder / POLICY), expected=f"a policy of schema {SCHEMA}", got=shown(policy, 200),
                        do="write the folder again with sentei prune")
    return policy


def read_receipt(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The receipt: tokens, int64 [T], and the outputs of the last of them, float32 [at most ROWS, …].

    These are logits, [… , vocabulary], or an encoder's last states, [… , width].

    Raises:
        FileError: not there, too large, or not such tokens of such a vocabulary.
    """
    from safetensors.torch import load_file

    path = member(folder, RECEIPT)
    if path.stat().st_size > MAX_RECEIPT_BYTES:
        raise FileError(str(path), expected=f"at most {MAX_RECEIPT_BYTES:,} bytes", got=f"{path.stat().st_size:,}",
                        do="write the folder again with sentei prune")
    shapes = {name: (tensor.dtype, len(tensor.shape)) for name, tensor in read_header(path).items()}
    tensors = load_file(path) if shapes in RECEIPT_SHAPES else None
    if tensors is None or not _is_receipt(**tensors):
        raise FileError(str(path), expected="tokens, and logits of a vocabulary that has them, or states",
                        got=shown(shapes), do="write the folder again with sentei prune")
    tokens = tensors.pop("tokens")
    return tokens, *tensors.values()


def _is_receipt(tokens: torch.Tensor, logits: torch.Tensor | None = None, states: torch.Tensor | None = None) -> bool:
    rows = len(states if logits is None else logits)
    vocabulary = float("inf") if logits is None else logits.shape[1]
    return len(tokens) > 0 and rows == min(ROWS, len(tokens)) and 0 <= tokens.min() <= tokens.max() < vocabulary


def check(folder: Path) -> dict:
    """Loads the folder and compares it with its receipt: {"difference", "tolerance", "met", "generated"}.

    "difference" is the largest absolute difference of the outputs; "generated" are 16 greedily generated tokens, of an
    encoder none.
    """
    torch.set_num_threads(_threads(read_policy(folder)))
    tokens, outputs = read_receipt(folder)
    model = load(folder)
    require_known(int(tokens.max()), model.config.vocab_size, str(Path(folder) / RECEIPT))
    found = _outputs(model, tokens)
    difference = (found - outputs).abs().max().item() if found.shape == outputs.shape else float("inf")
    tolerance = TOLERANCE[read_policy(folder)["dtype"]]
    return {"difference": difference if difference < float("inf") else -1.0, "tolerance": tolerance,
            "met": difference <= tolerance, "generated": _written(model, tokens) if model.can_generate() else []}


def _written(model: nn.Module, tokens: torch.Tensor) -> list[int]:
    """The 16 tokens that follow, greedily."""
    prompt = tokens[None, -64:]
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
                          pad_token_id=0)[0, prompt.shape[1]:].tolist()


def check_afresh(folder: Path) -> dict:
    """`check` in a process of its own.

    Raises:
        FileError: the process could not load the folder.
    """
    # -P keeps the working folder off the path: it may be the model's, and hold a json.py. This package comes last.
    code = ("import json, pathlib, sys; sys.path.append(sys.argv[2]); from sentei.conversion.export import check; "
            "print(json.dumps(check(pathlib.Path(sys.argv[1]))))")
    ran = subprocess.run([sys.executable, "-P", "-c", code, str(folder), str(Path(__file__).parents[2])],
                         capture_output=True, text=True, check=False)
    if ran.returncode:
        raise FileError(str(folder), expected="a folder that loads in a fresh process",
                        got=(ran.stderr.strip().splitlines() or ["no message"])[-1],
                        do="write the folder again with sentei prune")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def _threads(policy: dict) -> int:
    """The threads the receipt was made with, when this machine may use as many: sums then run in the same order."""
    threads = policy.get("threads")
    return threads if type(threads) is int and 1 <= threads <= (os.cpu_count() or 1) else torch.get_num_threads()


@torch.no_grad()
def _outputs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 [ROWS, …]: the logits of the last ROWS positions of tokens [T], or an encoder's last states there.

    From one pass; where decoding is pruned from a cache of the others, as in decoding. Layers beside the rooms run
    as torch has them: which of them are faster natively the clock says, in each process anew, and a choice between
    near equals may then come out otherwise.
    """
    with native.removed(model):
        return _last_rows(model, tokens)


def _last_rows(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if not len(tokens):
        raise SenteiError("receipt", expected="at least one token", got="none", do="give a longer text")
    if not family_of(model).causal:
        return model(input_ids=tokens[None]).last_hidden_state[0, -ROWS:].float().contiguous()
    if not cache.pruned_layers(model):
        return model(input_ids=tokens[None], use_cache=False, logits_to_keep=ROWS).logits[0].float().contiguous()
    kept = cache.make(model)
    if len(tokens) > ROWS:
        model(input_ids=tokens[None, :-ROWS], past_key_values=kept, use_cache=True, logits_to_keep=1)
    return model(input_ids=tokens[None, -ROWS:], past_key_values=kept, use_cache=True).logits[0].float().contiguous()


def _clean_config(path: Path, named: Callable[[dict], dict]) -> None:
    """Drops what transformers writes for itself: keys that begin with an underscore, which no loader should trust.

    Args:
        named: gives the settings the name by which they are written.
    """
    write_json(path, named({key: value for key, value in read_json(path).items() if not key.startswith("_")}))
