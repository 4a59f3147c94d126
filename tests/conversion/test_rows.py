"""Native linear layers, gated MLPs and norms put into models of every family and taken out again."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.conversion import rows
from sentei.conversion.families import FAMILIES
from sentei.conversion.rows import FewRowGated, FewRowNorm, FewRows, install, remove
from sentei.kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
TOKENS = torch.tensor([[5, 9, 17, 33]])


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The native calls that gave something."""
    made = []
    for name in ("gated", "norm"):
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
    choices = install(model, most_rows=8)
    calls.clear()
    assert all(choice.most_rows for choice in choices), [choice for choice in choices if not choice.most_rows]
    assert sum(isinstance(module, FewRowGated) for module in model.modules()) == 3
    assert sum(isinstance(module, FewRowNorm) for module in model.modules()) >= 7
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    after = copy.deepcopy(model)(TOKENS).logits
    assert calls.count("gated") == 3 and calls.count("norm") >= 7
    assert (after - exact).norm() <= 2 * (before - exact).norm()
    remove(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any({"few_rows", "form", "activation"} & set(vars(module)) for module in model.modules())
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Tanh(), nn.Hardswish()], ids=repr)
def test_another_activation_is_left(activation):
    model = nn.Sequential(Gated(activation).bfloat16())
    assert install(model, most_rows=8)[-1].reason.startswith("an activation that is neither")
    assert type(model[0]) is Gated


@pytest.mark.parametrize("module", [Swapped(nn.SiLU()), CentredRMSNorm()], ids=lambda module: type(module).__name__)
def test_what_computes_something_else_is_left(module):
    own = type(module)
    choice = install(nn.Sequential(module), most_rows=8)[-1]
    assert (choice.most_rows, choice.reason) == (0, "another result than the native one, on random rows")
    assert type(module) is own and "few_rows" not in vars(module)


def test_gradients_autocast_compile_hooks_and_more_rows_take_the_own_path(calls):
    model = nn.Sequential(Gated(nn.SiLU()), nn.RMSNorm(6, eps=1e-6))
    plain, x = copy.deepcopy(model), torch.randn(2, 6)
    install(model, most_rows=8)
    calls.clear()
    own, expected = (torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (model, plain))
    assert all(map(torch.equal, own, expected))
    with torch.no_grad():
        with torch.autocast("cpu"):
            assert torch.equal(model(x), plain(x))
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), plain(x))
        torch.testing.assert_close(model(torch.ones(600, 6)), plain(torch.ones(600, 6)))
        assert calls == []
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
        monkeypatch.setattr(rows.linear, "_gains", lambda modules, kind_of, ways, count, gain=gain: dict.fromkeys(
            map(kind_of, modules), gain))
        model = nn.Sequential(Gated(nn.SiLU()), nn.RMSNorm(6, eps=1e-6))
        choices = install(model)
        assert [choice.path for choice in choices[-2:]] == ["0", "1"]
        assert all(f"{gain:.2f} times as fast" in choice.reason for choice in choices)
        assert {isinstance(module, FewRows) for module in model} == {switched}


def test_it_measures_and_a_second_install_starts_afresh(monkeypatch):
    model = tiny_model("gemma3_text")
    counts, norm = set(), rows.rows.norm

    def noted(x, *others):
        output = norm(x, *others)
        counts.update([] if output is None else [x.shape[-2]])
        return output

    monkeypatch.setattr(rows.rows, "norm", noted)
    install(model, most_rows=8)
    assert all("times as fast" in choice.reason for choice in install(model))
    assert counts >= set(rows.NORM_ROWS)
