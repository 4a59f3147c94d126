"""The pure parts of benchmarks/bench_rivals.py, on tiny random models."""

import json

import pytest
import torch
from torch import nn

from benchmarks.bench_rivals import places, ratio
from benchmarks.rivals import formulas, page
from benchmarks.rivals.contest import Contender, goes_on, losses, times
from benchmarks.rivals.rebuilt import EXPERTS, ROUTERS, SHARED, Split, rebuild, save
from benchmarks.rivals.table import OURS, RIVALS, Rival
from sentei.axes.depth import Config as Depth
from sentei.budget.workload import Decode, Prefill
from sentei.conversion.plan import Plan, convert
from sentei.core.rules import Fixed
from sentei.measurement.quality import token_losses
from tests.tiny import tiny_model

TOKENS = torch.arange(3, 3 + 2 * 24).view(2, 24) * 7 % 300


@pytest.fixture
def model():
    return tiny_model("llama")


def logits(model):
    return model(input_ids=TOKENS).logits


def test_a_file_that_changes_nothing_is_the_dense_model_and_shares_its_weights(model, tmp_path):
    save(tmp_path / "a", {}, [0, 1, 2])
    made = rebuild(model, tmp_path / "a")
    assert torch.equal(logits(made), logits(model)) and made.model.layers[1] is not model.model.layers[1]
    assert made.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight


def test_layers_that_are_left_out_are_those_of_the_room_depth(model, tmp_path):
    save(tmp_path / "a", {}, [0, 2])
    made = rebuild(model, tmp_path / "a")
    assert len(made.model.layers) == made.config.num_hidden_layers == 2 and len(model.model.layers) == 3
    got = logits(made)
    convert(model, Plan.everywhere([1], "depth", Depth(rule=Fixed(()))))
    torch.testing.assert_close(got, logits(model), rtol=1e-5, atol=1e-5)


def test_a_rebuilt_model_goes_on_with_its_layers_of_a_dense_cache(model, tmp_path):
    save(tmp_path / "a", {}, [0, 2])
    made, workload = rebuild(model, tmp_path / "a"), Decode(24)
    prefixes = [workload.prefix(model, row) for row in TOKENS]
    before = prefixes[0].get_seq_length()
    found = losses(workload, TOKENS, prefixes, Contender(ready=lambda: made))
    assert prefixes[0].get_seq_length() == before  # the dense cache is as it was
    assert goes_on(made, prefixes[0])
    torch.testing.assert_close(found["itself"], token_losses(made, TOKENS)[:, -found["itself"].shape[1]:],
                               rtol=1e-5, atol=1e-5)
    convert(model, Plan.everywhere([1], "depth", Depth(rule=Fixed(()))))
    judged = torch.stack([workload.answer(model, row, prefix) for row, prefix in zip(TOKENS, prefixes, strict=True)])
    torch.testing.assert_close(found["dense"], judged, rtol=1e-5, atol=1e-5)
    assert (found["dense"] - found["itself"]).abs().max() > 1e-3


def test_a_narrower_stream_runs(model, tmp_path):
    state = {}
    for name, tensor in model.state_dict().items():
        narrow = tensor
        for axis in range(narrow.dim()):
            if narrow.shape[axis] == 64 and not (name.endswith("q_proj.weight") and axis == 0) \
                    and not (name.endswith("o_proj.weight") and axis == 1):
                narrow = narrow.narrow(axis, 0, 40)
        state[name] = narrow[:32] if name.endswith(("k_proj.weight", "v_proj.weight")) else narrow
    save(tmp_path / "a", {name: tensor.contiguous() for name, tensor in state.items()}, [0, 1, 2])
    made = rebuild(model, tmp_path / "a")
    assert made.model.layers[0].mlp.up_proj.in_features == 40
    assert logits(made).shape == logits(model).shape and torch.isfinite(logits(made)).all()


def test_other_heads_do_not_go_on_with_a_dense_cache(model, tmp_path):
    attention, size = model.model.layers[0].self_attn, model.model.layers[0].self_attn.head_dim
    save(tmp_path / "a", {f"model.layers.0.self_attn.{name}.weight": getattr(attention, name).weight[:size]
                          for name in ("k_proj", "v_proj")}, [0, 1, 2])
    made, workload = rebuild(model, tmp_path / "a"), Decode(24)
    assert made.model.layers[0].self_attn.num_key_value_groups == 4
    prefixes = [workload.prefix(model, row) for row in TOKENS]
    assert set(losses(workload, TOKENS, prefixes, Contender(ready=lambda: made))) == {"itself"}


def test_short_gpt_leaves_out_the_layer_that_turns_nothing(model, tmp_path):
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").weight.data.zero_()
    assert formulas.block_influence(model, TOKENS).argmin() == 1
    formulas.short_gpt(model, TOKENS, 1, tmp_path / "a")
    assert torch.equal(logits(rebuild(model, tmp_path / "a")), logits(model))


def test_wanda_weighs_by_what_is_read_and_magnitude_does_not(model, tmp_path):
    model.model.layers[0].input_layernorm.weight.data[:8] = 1e6  # read much larger than the others
    for formula in (formulas.magnitude, formulas.wanda):
        formula(model, TOKENS, 0.5, tmp_path / formula.__name__)
    plain, weighed = (rebuild(model, tmp_path / name).model.layers[0].self_attn.q_proj.weight
                      for name in ("magnitude", "wanda"))
    assert all((weight == 0).double().mean() == 0.5 for weight in (plain, weighed))
    assert ((weighed == 0).double().mean(1) == 0.5).all()  # of every output alike
    assert (weighed[:, :8] != 0).all() and not (plain[:, :8] != 0).all()
    dense = model.model.layers[0].self_attn.q_proj.weight
    assert plain[plain != 0].abs().min() >= dense[plain == 0].abs().max()


@pytest.mark.parametrize("shared", [0, 32])
def test_all_experts_are_the_dense_network_and_few_rows_choose_as_many_do(model, shared):
    network, x = model.model.layers[0].mlp, torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    order = torch.arange(96).flip(0)
    experts = order[shared:].view(-1, 16)
    parts = order[:shared], experts, experts[:, 3]
    torch.testing.assert_close(Split(network, *parts, len(experts))(x), network(x), rtol=1e-4, atol=1e-5)
    some = Split(network, *parts, 2)
    one_by_one = torch.cat([some(row[None, None]) for row in x.flatten(0, 1)], 1).view_as(x)
    torch.testing.assert_close(some(x), one_by_one)
    assert (some(x) - network(x)).abs().max() > 1e-3


def test_the_experts_that_are_chosen_have_the_largest_routers(model):
    network, x = model.model.layers[0].mlp, torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    experts = torch.arange(96).view(6, 16)
    unit = [nn.functional.normalize(weight[experts[:, 0]], dim=1) for weight in (
        network.gate_proj.weight, network.up_proj.weight)]
    scores = (nn.functional.silu(nn.functional.normalize(x, dim=1) @ unit[0].T)
              * (nn.functional.normalize(x, dim=1) @ unit[1].T)).abs()[0]
    neurons = experts[scores.argmax()]
    hidden = nn.functional.silu(x @ network.gate_proj.weight[neurons].T) * (x @ network.up_proj.weight[neurons].T)
    got = Split(network, torch.arange(0), experts, experts[:, 0], 1)(x)
    torch.testing.assert_close(got, hidden @ network.down_proj.weight[:, neurons].T)


def test_experts_come_from_a_file(model, tmp_path):
    experts = torch.arange(32, 96).view(4, 16)
    for active, same in ((4, True), (1, False)):
        save(tmp_path / "a", {f"model.layers.{index}.{name}": tensor for index in range(3) for name, tensor in (
            (SHARED, torch.arange(32)), (EXPERTS, experts), (ROUTERS, experts[:, 0]))}, [0, 1, 2], active=active)
        assert torch.allclose(logits(rebuild(model, tmp_path / "a")), logits(model), atol=1e-4) == same


def test_the_setting_for_a_speed_lies_between_those_that_were_timed():
    rival = Rival(name="a", setting="", ladder=(8, 16), whole=0)
    about = {8.0: 1.25, 16.0: 1 / 0.6}
    assert [rival.nearest(about, target) for target in (1.25, 1 / 0.9, 1 / 0.7, 3.0, 1.0)] == [8, 4, 12, 16, 0]
    assert Rival(name="a", setting="", ladder=(0.5,)).nearest({}, 2.0) == 0.5
    assert Rival(name="a", setting="", ladder=(1, 4)).nearest({1.0: 2.0, 4.0: 1.5}, 1.2) == 4


def test_contenders_take_turns_after_one_run_that_does_not_count(model, tmp_path):
    order = []

    def ready(name):
        return Contender(ready=lambda: order.append(name) or model)

    seconds = times(Prefill(24), TOKENS[0], {"dense": ready("dense"), "a": ready("a")}, 2)
    assert order[1:] == ["a", "dense", "dense", "a", "a", "dense"]
    assert {name: len(found) for name, found in seconds.items()} == {"dense": 2, "a": 2}


def test_a_first_run_does_not_count_by_any_clock(model):
    order, ticks = [], iter(range(100))
    contender = Contender(ready=lambda: order.append("a") or model)
    seconds = times(Prefill(24), TOKENS[0], {"a": contender}, 2, clock=lambda: next(ticks))
    assert seconds == {"a": [1, 1]} and len(order) == 4  # one that does not count, and one for the prefix
    assert ratio({"dense": [4.0, 9.0, 2.0], "pruned": [2.0, 3.0, 2.0]}) == 2.0


def test_places_leave_dense_out_and_reach_the_fastest():
    assert places([1.0] * 49) == [1, 8, 16, 24, 32, 40, 48] and places([1.0, 2.0]) == [1]


def found_of(speed, ratio, name="ShortGPT"):
    return {name: {"times": {"8": {"dense": [speed] * 3, "pruned": [1.0] * 3}},
                   "quality": {"8": {"itself": [ratio, ratio * 0.9, ratio * 1.1, 20.0]}}}}


def test_the_page_says_where_sentei_loses(tmp_path, monkeypatch):
    ours = {OURS: {kind: {place: found[OURS][kind]["8"] for place, found in (
        ("1", found_of(1.2, 1.05, OURS)), ("2", found_of(1.5, 1.3, OURS)))} for kind in ("times", "quality")}}
    cases = [({**ours, **found_of(1.19, 1.4)}, "ahead in 1 of 1"),
             ({**ours, **found_of(1.3, 1.2)}, "loses to**: ShortGPT"),
             ({**ours, **found_of(1.7, 9.0)}, "as fast as: ShortGPT")]
    for found, words in cases:
        assert words in page.verdict(found, "itself")
    lines = page.lines(cases[0][0], (1.2, 1.5), "itself")
    assert [line[0] for line in lines] == ["1.2x", "1.2x", "1.5x"] and lines[1][-1] == "**1.333**"
    (tmp_path / "decode-1024.json").write_text(json.dumps(cases[1][0] | {"plans": [], "foreseen": []}))
    written = {}
    monkeypatch.setattr(page, "write_result", lambda name, about, parts: written.update(parts=parts))
    page.write_page("a", tmp_path, (1.2, 1.5))
    assert written["parts"][0] == "## decode:1024, prompt read by itself" and "loses to" in written["parts"][1]


def test_every_rival_has_one_way_to_be_made():
    assert all((rival.write is None) != (rival.plan is None) and rival.ladder for rival in RIVALS.values())
