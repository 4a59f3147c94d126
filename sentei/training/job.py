"""`sentei train`: a YAML file → text as tokens → a model, trained, with its curve and a folder to load it from."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sentei.axes.connections import Config as Attended
from sentei.axes.experts import Experts
from sentei.axes.experts.gates import GATES, Noisy
from sentei.conversion.memory import require_memory
from sentei.conversion.model_folder import member
from sentei.core.errors import FileError, SenteiError, UnsupportedError
from sentei.core.progress import Progress, Silent
from sentei.core.safetensors_header import read_header
from sentei.core.storage import claimed, read_json, write_json, write_whole
from sentei.core.tracing import trace
from sentei.measurement.outcome import environment
from sentei.measurement.plots import write_curve
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.model.slots import DEPTHS, FEED_FORWARDS, Slot, is_by_task
from sentei.training import data
from sentei.training.loop import METRICS, Config, Optimizer, read_metrics, train
from sentei.training.losses import Balanced, Weights, of_predictors, of_rooms
from sentei.training.parallel import Config as Parallel
from sentei.training.parallel import World, world

SCHEMA = "sentei.train/1"
MARKER = "sentei-train.json"
WEIGHTS, SHAPE = "model.safetensors", "config.json"
MAX_YAML_BYTES = 1 << 16  # a second of reading
# YAML 1.1 takes 3e-4 for text, as it has no point.
_SHORT_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
SECTIONS = ("model", "data", "training", "balance", "parallel")


def run(path: Path, out: Path | None, progress: Progress) -> dict | None:
    """Trains what the file describes into `out`, from the newest checkpoint there on; returns the public result.

    Of processes that `torchrun` started one tells its progress and has a result, the others None.

    Args:
        out: by default a folder named after the job below ./sentei-out.
    Raises:
        SenteiError: a file or text that is not right.
        ResourceError: less memory than the weights, their gradients and two moments take; or a process was lost.
    """
    with world() as processes:
        return _run(path, out, progress if processes.first else Silent(), processes)


def _run(path: Path, out: Path | None, progress: Progress, processes: World) -> dict | None:
    """`run` in the processes there are."""
    with progress.stage("load", 1) as step:
        shape, read, config, weights, parallel = read_job(path)
        tokenizer = data.tokenizer_of(read.tokenizer, path.parent)
        require_memory(path, 4 * 4 * smallest(shape(tokenizer.vocabulary)))
        texts = data.texts_of(read.text, path.parent)
        job = {"model": shape(tokenizer.vocabulary).to_json(), "data": asdict(read), "training": asdict(config),
               "balance": asdict(weights)}
        job = json.loads(json.dumps(job))
        name = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:6]
        out = out or Path("sentei-out") / f"{path.stem}-{name}"
        step()
    with claimed(out, MARKER, "sentei train") if processes.first else nullcontext():
        windows = processes.in_turn(lambda: data.Windows(
            data.prepare(texts, tokenizer, out), context=read.context, held_out=read.held_out, seed=config.seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = Transformer(shape(tokenizer.vocabulary))
        processes.place(model, parallel)
        job |= {"tokens": windows.sha256, "environment": environment()}
        with progress.stage("train", config.steps) as step:
            told = train(model, windows, config, out, job=job, step=step, world=processes,
                         terms=(of_rooms, of_predictors, Balanced(weights, processes)))
        with progress.stage("write", 1) as step:
            tensors, result = processes.whole(model.state_dict()), _result(model, windows, config, told)
            if not processes.first:
                return None
            write_model(tensors, model.config, out)
            write_curve(out / "loss.svg", read_metrics(out / METRICS, config.steps))
            step()
    return result | {"out": str(out)}


def summary(result: dict) -> dict[str, str]:
    """The result for people, a line for each of its parts."""
    resumed = f", {result['resumed_from']:,} of them before" if result["resumed_from"] else ""
    code = f"from sentei.training.job import load_model; model = load_model({json.dumps(result['out'])})"
    return {
        "model": f"{result['parameters']:,} parameters, {result['bytes']:,} bytes",
        "steps": f"{result['steps']:,}{resumed}; {result['tokens_per_second']:,.0f} tokens a second",
        "loss": f"{result['loss_before']:.4f} before, {result['loss_after']:.4f} after (held-out text, nats a token)",
        "perplexity": f"{math.exp(result['loss_before']):.4g} before, {math.exp(result['loss_after']):.4g} after",
        "work": f"{result['multiply_adds_per_token']:,.0f} multiply-adds a token, {result['density']:.3f} of what it "
                "could be",
        "use it": code,
    }


def read_job(path: Path) -> tuple[Callable[[int], Shape], data.Config, Config, Weights, Parallel]:
    """The sections of a YAML file; what is left out has its default.

    Returns:
        the model's shape, from a vocabulary; what is read; how it is trained; what its experts' balance counts; and how
        processes share it.
    Raises:
        FileError: missing, too large, not YAML, with an unknown key, or a value out of range.
    """
    sections = _filled(str(path), read_yaml(path), {name: {} for name in SECTIONS})
    given = {name: {} if value is None else value for name, value in sections.items()}
    shape = Shape(vocabulary=1).to_json()
    del shape["vocabulary"]
    model = _filled("model", given["model"], shape)
    model["connections"] = _filled("model.connections", model["connections"], Attended().to_json())
    model["feed_forward"] = _filled_slot("model.feed_forward", model["feed_forward"], FEED_FORWARDS)
    model["depth"] = _filled_slot("model.depth", model["depth"], DEPTHS)
    training = _filled("training", given["training"], asdict(Config()))
    training["optimizer"] = _filled("training.optimizer", training["optimizer"], asdict(Optimizer()))
    read = _filled("data", given["data"], asdict(data.Config()))
    balance = _filled("balance", given["balance"], asdict(Weights()))
    read["text"] = tuple(read["text"]) if isinstance(read["text"], list) else read["text"]
    try:
        first = Shape.from_json({**model, "vocabulary": 1})
        read, config = data.Config(**read), Config(**{**training, "optimizer": Optimizer(**training["optimizer"])})
        weights = Weights(**balance)
        parallel = Parallel(**_filled("parallel", given["parallel"], asdict(Parallel())))
    except FileError:
        raise
    except SenteiError as error:
        raise FileError(f"{path}: {error.where}", expected=error.expected, got=error.got,
                        do="correct the file and run the command again") from error
    if not first.causal:
        raise UnsupportedError(f"{path}: model", expected="a causal model: the loss is that of the next token",
                               got="causal: false", do="leave it out")
    if is_by_task(first.feed_forward):
        raise UnsupportedError(f"{path}: model.feed_forward", expected="experts chosen by the token: text has no tasks",
                               got="the gate task", do="choose another gate, or train with a loop of your own")
    check_balance(path, first, weights)
    return lambda vocabulary: Shape.from_json({**model, "vocabulary": vocabulary}), read, config, weights, parallel


def check_balance(path: Path, shape: Shape, weights: Weights) -> None:
    """Raises FileError unless the model has what the losses balance."""
    gate = shape.feed_forward.room.gate if isinstance(shape.feed_forward, Routed) else None
    if weights.used() and gate is None:
        raise FileError(f"{path}: balance", expected="experts in model.feed_forward", got="none",
                        do="leave the section out")
    if weights.load and not isinstance(gate, Noisy):
        raise FileError(f"{path}: balance", expected="a noisy gate for the loss 'load'", got=repr(gate),
                        do="weigh 'switch' or 'importance'")


def read_yaml(path: Path) -> dict:
    """One mapping of plain values. No tags, no aliases, no key twice, and numbers such as 3e-4 are numbers.

    Raises:
        FileError: missing, too large, not UTF-8, or YAML that says something else.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader without what a configuration does not need."""

        def compose_node(self, parent, index):
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or getattr(event, "anchor", None):
                raise yaml.constructor.ConstructorError(None, None, "an anchor, alias or tag", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
                raise yaml.constructor.ConstructorError(None, None, "a key twice, or one that is no text",
                                                        node.start_mark)
            return super().construct_mapping(node, deep)

    def whole(loader, node):
        number = loader.construct_yaml_int(node)
        if abs(number) >> 63:  # Python does not even print what stands for ten thousand digits
            raise yaml.constructor.ConstructorError(None, None, "a number beyond 64 bits", node.start_mark)
        return number

    Loader.add_constructor("tag:yaml.org,2002:int", whole)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SHORT_FLOAT, list("-+0123456789"))
    try:
        if path.stat().st_size > MAX_YAML_BYTES or not path.is_file():
            raise FileError(str(path), expected=f"a file of at most {MAX_YAML_BYTES:,} bytes",
                            got="a larger one, or no file", do="check the path")
        value = yaml.load(path.read_bytes().decode("utf-8-sig"), Loader=Loader)
    except OSError as error:
        raise FileError(str(path), expected="a YAML file that can be read", got=str(error.strerror or error),
                        do="check the path; examples/train.yaml is one to begin with") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FileError(str(path), expected="YAML of plain values, each key once",
                        got=" ".join(str(error).split())[:300], do="correct the file") from error
    if not isinstance(value, dict):
        raise FileError(str(path), expected=f"the sections {', '.join(SECTIONS)}", got=type(value).__name__,
                        do="see examples/train.yaml")
    return value


def smallest(shape: Shape) -> int:
    """At least how many parameters a model of this shape has, without making it."""
    hidden = shape.feed_forward.neurons if isinstance(shape.feed_forward, Routed) else shape.feed_forward
    return shape.width * (shape.vocabulary + shape.layers * (2 * shape.width + 3 * hidden))


def write_model(weights: dict[str, torch.Tensor], shape: Shape, folder: Path) -> None:
    """Writes the weights, on the CPU, and the shape, each whole or not at all."""
    from safetensors.torch import save_file

    write_whole(folder / WEIGHTS, lambda temporary: save_file(weights, temporary))
    write_json(folder / SHAPE, {"schema": SCHEMA, "model": shape.to_json()})


def load_model(folder: Path | str) -> Transformer:
    """The model that `write_model` wrote, in eval mode.

    Raises:
        FileError: files that are missing, malformed, or do not fit each other.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    about, header = read_json(member(folder, SHAPE)), read_header(member(folder, WEIGHTS))
    if about.get("schema") != SCHEMA or "model" not in about:
        raise FileError(str(folder / SHAPE), expected=f"a model of {SCHEMA}", got="another file",
                        do="name a folder that sentei train wrote")
    shape = Shape.from_json(about["model"])
    if {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} != expected_tensors(shape):
        raise FileError(str(folder), expected="the tensors that config.json describes", got="others",
                        do="train the model again")
    with torch.device("meta"):
        model = Transformer(shape)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FileError(str(folder / WEIGHTS), expected="finite weights", got=f"NaN or infinity in {name}",
                            do="train the model again")
    model.load_state_dict(tensors, assign=True)
    for room in model.modules():
        if isinstance(room, Experts):
            room.forget()  # what is in no file is not on the meta device any more
    return model.eval()


def expected_tensors(shape: Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of a model's tensors by name, from one block: all are alike, and a file may ask for many."""
    with torch.device("meta"):
        one = Transformer(replace(shape, layers=1)).state_dict()
    first, kinds = "blocks.0.", {name: ("F32", tuple(tensor.shape)) for name, tensor in one.items()}
    return {name: kind for name, kind in kinds.items() if not name.startswith(first)} | {
        f"blocks.{layer}.{name.removeprefix(first)}": kind for layer in range(shape.layers)
        for name, kind in kinds.items() if name.startswith(first)}


def _result(model: Transformer, windows: data.Windows, config: Config, told: dict) -> dict:
    """The public object."""
    one = windows.held_out()[:1, :-1]
    with torch.no_grad(), trace(model.eval()) as records:
        model(one)
    cost, (parameters, size) = model.cost(records, one.shape), model.size()
    done = (config.steps - told["resumed_from"]) * config.batch * config.accumulate * (windows.size - 1)
    return {"schema": SCHEMA, "steps": config.steps, **told, "tokens_per_second": done / told["seconds"],
            "parameters": parameters, "bytes": size, "density": cost.density(),
            "multiply_adds_per_token": cost.multiply_adds / one.numel()}


def _filled(where: str, given: object, defaults: dict) -> dict:
    """`given` over `defaults`; a key that has no default is refused."""
    unknown = sorted(set(given) - set(defaults)) if isinstance(given, dict) else []
    if unknown or not isinstance(given, dict):
        raise FileError(where, expected=f"some of the keys {', '.join(defaults)}",
                        got=", ".join(unknown)[:200] or repr(given)[:200], do="correct the file")
    return {**defaults, **given}


def _filled_slot(where: str, given: object, slots: dict[str, Slot]) -> object:
    """A room's configuration over its defaults, and its gate over the gate's; anything else as it is."""
    room = given.get("room") if isinstance(given, dict) else None
    slot = slots.get(room) if isinstance(room, str) else None
    if slot is None or not hasattr(slot.config, "to_json"):
        return given
    value = _filled(where, given, {"room": room, **slot.config().to_json()})
    gate = value.get("gate")
    kind = GATES.get(gate.get("name")) if isinstance(gate, dict) and isinstance(gate.get("name"), str) else None
    return value if kind is None else {**value, "gate": _filled(f"{where}.gate", gate, kind().to_json())}
