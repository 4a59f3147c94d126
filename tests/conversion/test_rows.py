"""Native linear layers, gated MLPs, norms and heads put into models of every family and taken out again."""

import copy
import pickle

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.axes.connections import Config
from sentei.conversion import altered, linear, rows, wrapper
from sentei.conversion import native as conversion
from sentei.conversion.families import FAMILIES
from sentei.conversion.native import install, remove
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.conversion.rows import NativeGated, NativeHeads, NativeNorm, NativeRows
from sentei.core.rules import Threshold
from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
TOKENS = torch.tensor([[5, 9, 17, 33]])
# The layers that turn their heads, with a room or without, as those of Gemma that have a window; SmolLM3's second turns
# nothing.
TURNING = {"llama": 3, "smollm3": 2, "qwen2": 3, "qwen3": 3, "mistral": 3, "gemma3_text": 3}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The native calls that gave something."""
    made = []
    for name in ("gated", "norm", "heads"):
        function = getattr(rows.rows, name)

        def noted(*arguments, name=name, function=function):
            output = function(*arguments)
            made.extend([] if output is None else [name])
            return output

        monkeypatch.setattr(rows.rows, name, noted)
    return made


class Gated(nn.Module):
    def __init__(self, activation: nn.Module, width: int = 6):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(width, 9), nn.Linear(width, 9), nn.Linear(9, width)
        self.act_fn = activation

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class CentredRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

    def forward(self, x):
        return nn.functional.layer_norm(x, (6,), self.weight, None, self.eps)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_within_rounding_and_removing_gives_the_same_bits(family, dtype, calls):
    model = tiny_model(family).to(dtype)
    exact = copy.deepcopy(model).double()(TOKENS).logits
    before, classes = model(TOKENS).logits, [type(module) for module in model.modules()]
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    choices = install(model, most_rows=8, many_rows=0)
    calls.clear()
    left = [choice for choice in choices if not choice.most_rows]
    assert len(left) == 3 - TURNING[family] and all("native heads" in choice.reason for choice in left), left
    assert sum(isinstance(module, NativeGated) for module in model.modules()) == 3
    assert sum(isinstance(module, NativeNorm) for module in model.modules()) >= 7
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    after = copy.deepcopy(model)(TOKENS).logits
    assert calls.count("gated") == 3 and calls.count("norm") >= 7
    assert (after - exact).norm() <= 2 * (before - exact).norm()
    remove(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any({"native_rows", "form", "activation"} & set(vars(module)) for module in model.modules())
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Tanh(), nn.Hardswish()], ids=repr)
def test_another_activation_is_left(activation):
    model = nn.Sequential(Gated(activation).bfloat16())
    assert install(model, most_rows=8, many_rows=0)[-1].reason.startswith("an activation that is neither")
    assert type(model[0]) is Gated


@pytest.mark.parametrize("module", [Swapped(nn.SiLU()), CentredRMSNorm()], ids=lambda module: type(module).__name__)
def test_what_computes_something_else_is_left(module):
    own = type(module)
    choice = install(nn.Sequential(module), most_rows=8)[-1]
    assert (choice.most_rows, choice.reason) == (0, "another result than the native one, on random rows")
    assert type(module) is own and "native_rows" not in vars(module)


def test_gradients_autocast_hooks_and_more_rows_take_the_own_path_and_a_graph_ops(calls):
    model = nn.Sequential(Gated(nn.SiLU()), nn.RMSNorm(6, eps=1e-6))
    plain, x = copy.deepcopy(model), torch.randn(2, 6)
    install(model, most_rows=8, many_rows=0)
    calls.clear()
    own, expected = (torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (model, plain))
    assert all(map(torch.equal, own, expected))
    with torch.no_grad():
        with torch.autocast("cpu"):
            assert torch.equal(model(x), plain(x))
        torch.testing.assert_close(model(torch.ones(600, 6)), plain(torch.ones(600, 6)))
        assert calls == []
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain(x))
        assert calls == ["gated", "norm"], "a graph keeps the native calls, as ops"
        calls.clear()
        torch.testing.assert_close(model(x), plain(x))
        assert calls == ["gated", "norm"]
        seen = []
        handle = model[0].gate_proj.register_forward_hook(lambda *_: seen.append(1))
        model(x)
        assert seen == [1] and calls == ["gated", "norm", "norm"]
        handle.remove()
        model[0].act_fn = nn.Tanh()
        plain[0].act_fn = nn.Tanh()
        torch.testing.assert_close(model(x), plain(x))


def test_only_what_was_measured_faster_is_switched(monkeypatch):
    for gain, switched in ((0.9, False), (2.0, True)):
        monkeypatch.setattr(linear, "_gains", lambda modules, kind_of, ways, count, gain=gain: dict.fromkeys(
            map(kind_of, modules), gain))
        model = nn.Sequential(Gated(nn.SiLU()), nn.RMSNorm(6, eps=1e-6))
        choices = install(model)
        assert [choice.path for choice in choices[-2:]] == ["0", "1"]
        assert all(f"{gain:.2f} times as fast" in choice.reason for choice in choices)
        assert {isinstance(module, NativeRows) for module in model} == {switched}


def test_it_measures_and_a_second_install_starts_afresh(monkeypatch):
    model = tiny_model("gemma3_text")
    counts, norm = set(), rows.rows.norm

    def noted(x, *others):
        output = norm(x, *others)
        counts.update([] if output is None else [x.shape[-2]])
        return output

    monkeypatch.setattr(rows.rows, "norm", noted)
    install(model, most_rows=8, many_rows=0)
    assert all("times as fast" in choice.reason for choice in install(model))
    assert counts >= {*altered.NORM_STEPS.few, *altered.NORM_STEPS.many}


def decoding(family: str, monkeypatch, dtype=torch.float32, *, whole: bool = False) -> nn.Module:
    """A tiny model that reads every page natively, whatever is faster here; `whole`: its layers too, in one call."""
    model = tiny_model(family).to(dtype)
    monkeypatch.setattr(conversion, "install", lambda given, right=conversion.install, **asked: right(
        given, most_rows=8, many_rows=0))
    if not whole:
        monkeypatch.setattr(conversion, "KINDS", rows.KINDS)
    convert(model, Plan.everywhere(prunable_layers(model), "connections", Config(decode=Threshold(0.0))))
    return model


@torch.no_grad()
def steps(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of tokens that come one by one and two by two."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    parts = tokens.split([5, 1, 2, 1], 1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_native_heads_decode_as_the_dense_model_does(family, dtype, calls, monkeypatch):
    tokens = torch.arange(9)[None] * 7 + 3
    before = steps(tiny_model(family).to(dtype), tokens)
    exact = steps(tiny_model(family).double(), tokens)
    model = decoding(family, monkeypatch, dtype)
    switched = [module for module in model.modules() if isinstance(module, NativeHeads)]
    calls.clear()
    after = steps(model, tokens)
    assert len(switched) == TURNING[family] and (
        calls.count("heads") == 4 * len(switched))
    assert (after - exact).norm() <= max(2 * (before - exact).norm(), torch.finfo(torch.float32).eps * exact.norm())
    convert(model, Plan())
    assert not any(isinstance(module, NativeHeads) or "turn" in vars(module) for module in model.modules())
    assert torch.equal(steps(model, tokens), before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_natively_where_its_rows_are_many(family, dtype, calls, monkeypatch):
    tokens = torch.arange(24).view(2, 12) * 7 % 90 + 3
    model, exact = tiny_model(family).to(dtype), tiny_model(family).to(dtype).double()(tokens).logits
    before = model(tokens).logits
    monkeypatch.setattr(conversion, "install", lambda given, right=conversion.install, **asked: right(
        given, most_rows=0, many_rows=24))
    convert(model, Plan.everywhere(prunable_layers(model), "connections", Config()))
    calls.clear()
    after = model(tokens).logits
    assert calls.count("heads") == TURNING[family] and calls.count("gated") == 3 and calls.count("norm") >= 7
    assert (after - exact).norm() <= max(2 * (before - exact).norm(), torch.finfo(torch.float32).eps * exact.norm())
    calls.clear()
    model(tokens[:1])
    assert set(calls) <= {"norm"}, "only norms of heads have as many rows"


@torch.no_grad()
def test_weights_too_many_to_be_copied_take_few_rows_alone(calls, monkeypatch):
    monkeypatch.setattr(rows.rows, "MOST_LAID_OUT", 10)
    monkeypatch.setattr(conversion, "install", lambda given, right=conversion.install, **asked: right(
        given, most_rows=8, many_rows=9))
    model, tokens = tiny_model("llama"), torch.arange(12)[None] * 7 + 3
    before = model(tokens).logits
    convert(model, Plan.everywhere(prunable_layers(model), "connections", Config()))
    chosen = {kind: {(module.native_rows.most_rows > 0, module.native_rows.many_rows) for module in model.modules()
                     if isinstance(module, kind)} for kind in (NativeHeads, NativeGated, NativeNorm)}
    assert chosen == {NativeHeads: {(True, 0)}, NativeGated: {(True, 0)}, NativeNorm: {(True, 9)}}
    calls.clear()
    torch.testing.assert_close(model(tokens).logits, before)
    assert set(calls) == {"norm"}


@pytest.mark.parametrize("wrong", ["sign", "pairs", "no turn"])
def test_heads_that_are_turned_otherwise_are_left(wrong, monkeypatch):
    from transformers.models.llama import modeling_llama

    def other(query, key, cosine, sine):
        cosine, sine = cosine[:, None], sine[:, None]
        if wrong == "no turn":
            return query, key
        if wrong == "sign":
            sine = -sine
        def half(x):
            return (torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) if wrong == "pairs"
                    else modeling_llama.rotate_half(x))
        return query * cosine + half(query) * sine, key * cosine + half(key) * sine

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    model = decoding("llama", monkeypatch)
    assert not any(isinstance(module, NativeHeads) for module in model.modules())


def test_another_forward_or_norms_of_unlike_epsilons_are_left(monkeypatch):
    model = decoding("qwen3", monkeypatch)
    choices = {choice.path: choice for choice in conversion.install(model)}
    path = "model.layers.1.self_attn"
    assert choices[path].most_rows == 8
    model.get_submodule(path).q_norm.variance_epsilon = 1e-3
    assert {choice.path: choice for choice in conversion.install(model)}[path].reason == (
        "norms without one epsilon, or an odd width")

    class Other(type(model.model.layers[0].self_attn).__bases__[1]):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)

    remove(model)
    model.model.layers[0].self_attn.__class__ = Other
    assert {choice.path: choice for choice in conversion.install(model)}["model.layers.0.self_attn"].reason == (
        "another forward than transformers' attention has")


@torch.no_grad()
def test_hooks_training_and_other_attention_take_the_own_path(calls, monkeypatch):
    model, tokens = decoding("llama", monkeypatch), torch.arange(9)[None]
    expected = steps(model, tokens)
    seen = []
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    torch.testing.assert_close(steps(model, tokens), expected)
    assert len(seen) == 4 and calls.count("heads") == 8
    handle.remove()
    seen.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    steps(model, tokens)
    handle.remove()
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            assert sum(module is part for module in seen) == 4
    for switch in (lambda: model.train(), lambda: wrapper.use(model.eval(), "eager")):
        switch()
        calls.clear()
        torch.testing.assert_close(steps(model, tokens), expected, rtol=1e-4, atol=1e-4)
        assert "heads" not in calls


@torch.no_grad()
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "mlp.up_proj", "mlp.act_fn"])
@pytest.mark.parametrize("change", ["forward", "parametrized", "replaced"])
def test_a_module_that_is_altered_after_conversion_is_called(part, change, monkeypatch):
    def alter(model):
        layer = model.model.layers[1]
        holder, name = (layer.mlp, part[4:]) if part.startswith("mlp") else (layer.self_attn, part)
        module = getattr(holder, name)
        if change == "forward":
            own = module.forward
            module.forward = lambda x: own(x) * 3
        elif change == "replaced":
            setattr(holder, name, nn.Sequential(module, nn.Tanh()))
        elif hasattr(module, "weight"):
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
        return steps(model, torch.arange(9)[None])

    expected = alter(tiny_model("qwen3"))
    found = alter(decoding("qwen3", monkeypatch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_made_dense_again_is_pickled(monkeypatch):
    model = decoding("qwen3", monkeypatch)
    monkeypatch.undo()
    install(model)
    convert(model, Plan())
    assert model.__dict__[linear.MEASURED]
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@torch.no_grad()
def test_an_epsilon_of_one_norm_and_a_scale_are_read_at_every_call(monkeypatch):
    def alter(model):
        attention = model.model.layers[0].self_attn
        attention.q_norm.variance_epsilon = 0.5
        attention.scaling = 2.0
        return steps(model, torch.arange(9)[None])

    torch.testing.assert_close(alter(decoding("qwen3", monkeypatch)), alter(tiny_model("qwen3")), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoding_step_is_one_graph(monkeypatch):
    from transformers import DynamicCache

    model = decoding("llama", monkeypatch)
    cache = DynamicCache(config=model.config)
    model(torch.arange(40)[None], past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(torch.tensor([[3]]), past_key_values=cache, use_cache=True)
    assert explained.graph_count == 1, explained.break_reasons
