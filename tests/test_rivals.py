"""The pure parts of benchmarks/bench_rivals.py, on tiny random models."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import bench_rivals
from benchmarks.rivals import contest, formulas, healing, page
from benchmarks.rivals.bench import Bench, key_of, timed_as
from benchmarks.rivals.curve import Point, at, front
from benchmarks.rivals.points import Points
from benchmarks.rivals.recipe import Split, build, cache_of, kept_by, lettered, masked
from benchmarks.rivals.table import CALM, DEPTH, OURS, RIVALS, Rival, packed
from sentei.axes.depth import Config as Depth
from sentei.axes.heads import Config as Heads
from sentei.budget.workload import Decode, Prefill
from sentei.conversion import native
from sentei.conversion.linear import MEASURED
from sentei.conversion.plan import Plan, convert
from sentei.core.rules import Fixed
from sentei.measurement.quality import losses_after
from sentei.training.healing import Config, Texts
from tests.tiny import tiny_model

TOKENS = torch.arange(3, 3 + 2 * 24).view(2, 24) * 7 % 300
EXPERTS = [list(range(16 * number, 16 * number + 16)) for number in range(6)]


@pytest.fixture
def model():
    return tiny_model("llama")


def logits(model):
    return model(input_ids=TOKENS).logits


def bench_of(model, tmp_path, workload):
    bench = Bench(workload, tmp_path, tmp_path, {})
    vars(bench).update(model=model, windows={"calibrate": TOKENS, "choose": TOKENS, "verify": TOKENS},
                       library=lambda plan: None)
    return bench


def test_a_recipe_that_leaves_all_is_the_dense_model_and_shares_its_weights(model):
    made = build(model, {"layers": [0, 1, 2]})
    assert torch.equal(logits(made), logits(model)) and made.model.layers[1] is not model.model.layers[1]
    assert made.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight


def test_layers_that_are_left_out_are_those_of_the_room_depth(model):
    made = build(model, {"layers": [0, 2]})
    assert len(made.model.layers) == made.config.num_hidden_layers == 2 and len(model.model.layers) == 3
    got = logits(made)
    convert(model, Plan.everywhere([1], "depth", Depth(rule=Fixed(()))))
    torch.testing.assert_close(got, logits(model), rtol=1e-5, atol=1e-5)


def test_neurons_that_are_left_out_are_as_if_they_gave_nothing(model):
    kept = [[neuron for neuron in range(96) if neuron % 5 != number] for number in range(2)]
    got = logits(build(model, {"layers": [0, 2], "neurons": [masked(each, 96) for each in kept]}))
    for number, each in zip((0, 2), kept, strict=True):
        gone = [neuron for neuron in range(96) if neuron not in each]
        model.model.layers[number].mlp.down_proj.weight.data[:, gone] = 0
    torch.testing.assert_close(got, logits(build(model, {"layers": [0, 2]})), rtol=1e-4, atol=1e-5)


def test_a_narrower_stream_is_one_in_which_the_others_are_nothing(model):
    kept = [number for number in range(64) if number % 3]
    got = logits(build(model, {"layers": [0, 1, 2], "stream": masked(kept, 64)}))
    gone = [number for number in range(64) if number not in kept]
    model.model.embed_tokens.weight.data[:, gone] = 0
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.weight.data[gone] = 0
        if name.endswith("norm"):  # the mean square is over fewer numbers
            module.weight.data *= (len(kept) / 64) ** 0.5
    torch.testing.assert_close(got, logits(model), rtol=1e-3, atol=1e-3)
    assert got.abs().max() > 0.1


def test_masks_tell_what_they_were_told():
    assert kept_by(masked([0, 5, 9], 12)).tolist() == [0, 5, 9] and len(masked([0], 12)) == 3
    assert lettered([1, 3], [[0], [2]]) == "a.b."


def test_widths_of_one_size_are_timed_as_one_and_told_apart():
    one, other, smaller = ({"layers": [0, 1], "neurons": [masked(kept, 8)] * 2} for kept in ([0, 1], [2, 3], [4]))
    assert timed_as(one) == timed_as(other) != timed_as(smaller) and key_of(one) != key_of(other)
    assert timed_as({"layers": [0, 2]}) == timed_as({"layers": [0, 1]}) != timed_as(one)
    assert key_of(one) == key_of({**one, "package": "a 1"})


@pytest.mark.parametrize("recipe", [
    {"layers": [0, 2]}, {"layers": [0, 1, 2], "neurons": [masked(list(range(64)), 96)] * 3},
    {"layers": [0, 1, 2], "stream": masked(list(range(40)), 64)},
    {"layers": [0, 1, 2], "active": 2, "experts": [{"groups": lettered([], EXPERTS), "routers": [0, 16, 32, 48, 64, 80]}
                                                   ] * 3},
    {"plan": Plan.everywhere(range(3), "heads", Heads(num_kv_heads=1)).to_json()}])
@pytest.mark.parametrize("workload", [Prefill(24), Decode(24)])
def test_native_layers_change_nothing_that_is_left(model, tmp_path, recipe, workload):
    bench = bench_of(model, tmp_path, workload)
    plain, made = bench.made(recipe, native=False), bench.made(recipe)
    assert not native.is_installed(plain) and all(hasattr(layer.self_attn, "connections")
                                                  for layer in made.model.layers)
    got, expected = (contest.losses(workload, TOKENS, each) for each in (made, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert vars(made)[MEASURED] is vars(model)[MEASURED] and vars(made)[MEASURED]
    assert (expected - contest.losses(workload, TOKENS, model)).abs().max() > 1e-3


def test_a_model_goes_on_with_its_layers_of_a_dense_cache(model):
    made, workload = build(model, {"layers": [0, 2]}), Decode(24)
    prefix = workload.prefix(model, TOKENS[0])
    part = cache_of(made, prefix)
    assert part.layers == [prefix.layers[0], prefix.layers[2]] and cache_of(model, prefix) is prefix
    workload.begin(made, TOKENS[0], part)()
    assert prefix.get_seq_length() == 12  # the dense cache is as it was
    one_by_one = torch.stack([losses_after(made, row, workload.prefix(made, row), rows=1) for row in TOKENS])
    torch.testing.assert_close(contest.losses(workload, TOKENS, made), one_by_one, rtol=1e-5, atol=1e-5)


def test_short_gpt_leaves_out_the_layer_that_turns_nothing(model):
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").weight.data.zero_()
    assert formulas.block_influence(model, TOKENS).argmin() == 1
    assert formulas.short_gpt(model, TOKENS, 1) == {"layers": [0, 2]}


def test_wanda_leaves_out_neurons_that_say_little_or_are_read_little(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight.data[:, :8] *= 1e-6
    mlp.up_proj.weight.data[8:16] *= 1e-6
    kept = kept_by(formulas.wanda_width(model, TOKENS, 100 * 16 / 96)["neurons"][1]).tolist()
    assert kept == list(range(16, 96))


@pytest.mark.parametrize("shared", [0, 2])
def test_all_experts_are_the_dense_network_and_few_rows_choose_as_many_do(model, shared):
    network, x = model.model.layers[0].mlp, torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    groups = lettered(sum(EXPERTS[:shared], []), EXPERTS[shared:])
    routers = [own[3] for own in EXPERTS[shared:]]
    torch.testing.assert_close(Split(network, groups, routers, len(routers))(x), network(x), rtol=1e-4, atol=1e-5)
    some = Split(network, groups, routers, 2)
    one_by_one = torch.cat([some(row[None, None]) for row in x.flatten(0, 1)], 1).view_as(x)
    torch.testing.assert_close(some(x), one_by_one, rtol=1e-4, atol=1e-5)
    assert (some(x) - network(x)).abs().max() > 1e-3


def test_the_experts_that_are_chosen_have_the_largest_routers(model):
    network, x = model.model.layers[0].mlp, torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    routers = [own[0] for own in EXPERTS]
    gate, up = (nn.functional.normalize(weight[routers], dim=1) for weight in (
        network.gate_proj.weight, network.up_proj.weight))
    unit = nn.functional.normalize(x, dim=1)
    neurons = EXPERTS[(nn.functional.silu(unit @ gate.T) * (unit @ up.T)).abs()[0].argmax()]
    hidden = nn.functional.silu(x @ network.gate_proj.weight[neurons].T) * (x @ network.up_proj.weight[neurons].T)
    got = Split(network, lettered([], EXPERTS), routers, 1)(x)
    torch.testing.assert_close(got, hidden @ network.down_proj.weight[:, neurons].T, rtol=1e-4, atol=1e-5)


def test_what_scripts_say_becomes_a_recipe(model):
    assert packed(model.config, {"gone": [2, 0], "package": "a 1"}, 1) == {"layers": [0, 1], "package": "a 1"}
    recipe = packed(model.config, {"neurons": [[1]] * 3, "stream": [0, 63], "active": 2, "experts": [
        {"shared": EXPERTS[0], "experts": EXPERTS[1:], "routers": [16]}]}, 3)
    assert kept_by(recipe["neurons"][2]).tolist() == [1] and kept_by(recipe["stream"]).tolist() == [0, 63]
    assert recipe["layers"] == [0, 1, 2] and recipe["experts"][0]["groups"] == "." * 16 + "".join(
        letter * 16 for letter in "abcde")


def test_contenders_take_turns_after_one_run_that_does_not_count(model, monkeypatch):
    other, order, ticks = build(model, {"layers": [0, 2]}), [], iter(range(100))
    monkeypatch.setattr(Prefill, "begin", lambda self, model, row, prefix: lambda: order.append(model))
    seconds = contest.times(Prefill(24), TOKENS[0], {"dense": model, "a": other}, 2, clock=lambda: next(ticks))
    assert [each is model for each in order] == [False, True, True, False, False, True]
    assert seconds == {"dense": [1, 1], "a": [1, 1]}


def test_points_go_on_after_a_line_that_was_cut_off(tmp_path):
    points = Points(tmp_path / "new" / "a.jsonl")
    points.add({"a": 1, "b": 2})
    points.add({"a": 1, "b": 3})
    with open(points.path, "a", encoding="utf-8") as file:
        file.write('{"a": 1, "b"')
    again = Points(points.path)
    again.add({"a": 2})
    assert Points(points.path).rows == [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 2}]
    assert again.where(a=1, b=3) == [{"a": 1, "b": 3}]


def asked(**more):
    return argparse.Namespace(**{"only": [*RIVALS, OURS], "torch": False, "until": float("inf"), **more})


def test_each_step_does_what_is_left_and_nothing_twice(model, tmp_path, capsys):
    bench = bench_of(model, tmp_path, Prefill(130))
    vars(bench)["windows"] = {"verify": torch.arange(4 * 130).view(4, 130) * 7 % 300}
    widths = [{"layers": [0, 1, 2], "neurons": [masked(kept, 96)] * 3} for kept in ([0, 1], [2, 3])]
    for name, recipe in zip(("Wanda width", "optipfair width"), widths, strict=True):
        bench.points("recipes").add({"rival": name, "setting": 50, "workload": None, "recipe": recipe})
    bench.points("recipes").add({"rival": CALM, "setting": 0.5, "workload": None,
                                 "recipe": {"layers": [0, 1, 2], "losses": [[1.0]], "ran": 2.0}})
    bench_rivals.time(bench, asked(until=0))
    assert not bench.points("times").rows and "no time for 1" in capsys.readouterr().out
    for _ in range(2):
        bench_rivals.time(bench, asked())
        bench_rivals.judge(bench, asked())
    assert [set(row) >= {"transformers", "dense", "pruned"} for row in bench.points("times").rows] == [True]
    assert [row["rival"] for row in bench.points("quality").rows] == ["Wanda width", "optipfair width"]
    assert [(row.name, row.setting, len(row.speeds)) for row in page.rows_of(tmp_path, "prefill:130")] == [
        ("Wanda width", 50, 3), ("optipfair width", 50, 3)]
    assert page.rows_of(tmp_path, "decode:130") == []


def test_recipes_are_made_once_and_plans_again_where_that_is_asked(model, tmp_path, monkeypatch):
    bench, made, plan = bench_of(model, tmp_path, Prefill(24)), [], Plan.everywhere([1], "depth", Depth(rule=Fixed(())))
    rival = Rival(name="a", setting="", ladder=(1, 2),
                  make=lambda bench, setting: made.append(setting) or {"layers": []})
    monkeypatch.setattr(bench_rivals, "RIVALS", {"a": rival})
    monkeypatch.setattr(bench_rivals.ours, "plans", lambda *given: made.append(given[-1].exists()) or [(1.5, plan)])
    stages = tmp_path / "stages-prefill-24"
    stages.mkdir()
    for again in (False, False, True):
        bench_rivals.make(bench, asked(only=["a", OURS], again=again))
    assert made == [1, 2, True, False]
    assert [(row["rival"], row["workload"]) for row in bench.points("recipes").rows] == [
        ("a", None), ("a", None), (OURS, "prefill:24"), (OURS, "prefill:24")]
    assert [(row["rival"], row["setting"]) for row in bench_of(model, tmp_path, Decode(24)).recipes()] == []


def test_healing_makes_a_pruned_model_say_what_the_dense_one_says(model, tmp_path):
    bench, recipe = bench_of(model, tmp_path, Prefill(24)), {"layers": [0, 2]}
    texts = Texts(rows=TOKENS, checks=TOKENS, seed=0)
    made = healing.healed(bench, recipe, texts, Config(minutes=0.02))
    before, after, dense = (torch.log_softmax(logits(each), -1) for each in (build(model, recipe), made, model))
    far = [(dense.exp() * (dense - each)).sum(-1).mean().item() for each in (before, after)]
    assert far[1] < 0.9 * far[0]
    assert native.is_installed(made) or all(hasattr(layer.self_attn, "connections") for layer in made.model.layers)


def point(speed, ratio):
    return Point(speed=speed, ratio=ratio, low=ratio * 0.9, high=ratio * 1.1)


def test_a_curve_goes_through_its_points_and_no_further():
    points = [point(1.25, 2.0), point(2.5, 8.0), point(1.2, 3.0), point(0.9, 1.5)]
    assert [each.speed for each in front(points)] == [1.0, 1.25, 2.5]  # what is slower and worse tells nothing
    assert at(points, 1.25).ratio == pytest.approx(2.0) and at(points, 2.5).high == pytest.approx(8.8)
    assert at(points, 1 / 0.6).ratio == pytest.approx(4.0)  # half the way of time, half the way of nats
    assert at(points, 1 / 0.9).ratio == pytest.approx(2 ** 0.5)
    assert at(points, 2.6) is None and at([], 1.2) is None


def write(tmp_path, rows):
    kinds = {kind: Points(tmp_path / f"{kind}.jsonl") for kind in ("recipes", "quality", "times")}
    for name, setting, recipe, speed, ratio in rows:
        kinds["recipes"].add({"rival": name, "setting": setting, "workload": None, "recipe": recipe})
        kinds["quality"].add({"workload": "decode:1024", "key": key_of(recipe), "healed": 0, "ratio": ratio,
                              "low": ratio * 0.9, "high": ratio * 1.1, "dense": 20.0})
        if speed:
            kinds["times"].add({"workload": "decode:1024", "way": "native", "key": timed_as(recipe),
                                "transformers": [2 * speed] * 3, "dense": [speed] * 3, "pruned": [1.0] * 3})


def test_the_page_says_where_sentei_loses(tmp_path, monkeypatch):
    full = list(range(30))
    write(tmp_path, [(OURS, 1.5, {"plan": []}, 1.6, 1.5), (DEPTH, 6, {"layers": full[6:]}, 1.25, 1.1),
                     (DEPTH, 15, {"layers": full[15:]}, 2.5, 9.0), ("Wanda width", 50, {"layers": full, "neurons": [
                         "f"]}, 1.3, 4.0), (CALM, 0.5, {"layers": full, "losses": [], "ran": 27.0}, None, 1.7)])
    rows = page.rows_of(tmp_path, "decode:1024")
    calm = next(row for row in rows if row.name == CALM)
    assert calm.speed == pytest.approx(1 / 0.9)  # half of what six layers save
    points = page.curves(rows, 0)
    words = page.verdict(points)
    assert "ahead in 2 of 4" in words and "ShortGPT at 1.2 (" in words and "as fast as: ShortGPT at 2." in words
    lines = {line[0]: line for line in page.compared(points)}
    assert lines[CALM][1] == "not reached (1.11)" and lines[f"**{OURS}**"][2] == "" and "**" in lines[DEPTH][4]
    assert lines["Wanda width"][2] == f"**{4 ** (1 / 1.3845) / 1.5 ** (1 / 2.25):.3f}**"
    written = {}
    monkeypatch.setattr(page, "write_result", lambda name, about, parts: written.update(parts=parts))
    page.write_page("a", tmp_path)
    assert written["parts"][0] == "## decode:1024" and "2.00 times" in written["parts"][1]


def test_scripts_for_other_environments_know_nothing_of_sentei():
    folder = Path(bench_rivals.__file__).parent / "rivals" / "elsewhere"
    scripts = sorted(folder.glob("*.py"))
    assert len(scripts) == 5 and all("import sentei" not in path.read_text() and "from sentei" not in path.read_text()
                                     for path in scripts)
    assert all(rival.ladder for rival in RIVALS.values()) and json.dumps([rival.ladder for rival in RIVALS.values()])
