"""The solver on made-up slack: what it must prefer, whatever the model."""

import pytest

from sentei.axes.connections import Config
from sentei.axes.depth import Config as Depth
from sentei.axes.weights import Config as Weights
from sentei.budget.goal import Goal
from sentei.budget.judge import Judgement
from sentei.budget.slack import LayerSlack, Option
from sentei.budget.solver import Candidate, Forecast, beside, family, search, solve, uniform
from sentei.budget.workload import Decode, Prefill
from sentei.conversion.plan import Entry, Plan
from sentei.core.rules import All, Fixed, Threshold, TopK
from sentei.measurement.quality import Quality

RATIOS, DENSITIES = (0.01, 0.1), (0.6, 0.3)
PREFILL, DECODE = Prefill(64), Decode(64)
KEEPING_ALL = Plan.everywhere((0, 1), "connections", Config())
# Of 10 s the attention of two layers is 2 s.
FORECAST = Forecast(dense=10.0, others=8.0, runs=1)


def layer(number: int, errors: tuple[float, float], *, late: float = 0.0) -> LayerSlack:
    """A layer of two heads that takes 0.1 + density seconds, and `late` more for its last option."""
    options = [Option(rule=All(), density=[1.0, 1.0], error=[0.0, 0.0], seconds=1.0)]
    for place, (ratio, density, error) in enumerate(zip(RATIOS, DENSITIES, errors, strict=True)):
        options.append(Option(rule=Threshold(ratio), density=[density] * 2, error=[error, error],
                              seconds=0.1 + density + late * place))
    return LayerSlack(layer=number, options=options)


def density_of(candidate, number: int) -> float:
    entry = next((entry for entry in candidate.plan.entries if entry.layer == number), None)
    ratios = (0.0, 0.0) if entry is None or entry.config.rule == All() else entry.config.rule.ratio
    return sum(dict(zip((0.0, *RATIOS), (1.0, *DENSITIES), strict=True))[ratio] for ratio in ratios) / 2


def test_plans_go_from_dense_to_sparsest_and_only_get_faster():
    candidates = family([layer(0, (1e-4, 1e-2)), layer(1, (1e-3, 1e-1))], Config(), PREFILL)
    seconds = [candidate.seconds for candidate in candidates]
    assert candidates[0].plan == Plan() and candidates[1].plan == KEEPING_ALL
    assert candidates[0].density == candidates[1].density == 1.0
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds) - 1
    assert candidates[-1].density == pytest.approx(0.3)


def test_the_cheaper_layer_is_pruned_first():
    candidates = family([layer(0, (1e-6, 1e-5)), layer(1, (1e-1, 1.0))], Config(), PREFILL)
    assert all(density_of(candidate, 0) <= density_of(candidate, 1) for candidate in candidates)
    assert any(density_of(candidate, 0) < density_of(candidate, 1) for candidate in candidates)


def test_a_layer_whose_clock_was_disturbed_is_pruned_like_the_others():
    slack = [layer(number, (1e-4, 1e-3), late=0.3 if number == 2 else 0.0) for number in range(6)]
    assert len(family(slack, Config(), PREFILL)) > 2
    for candidate in family(slack, Config(), PREFILL)[1:]:
        assert density_of(candidate, 2) == density_of(candidate, 0)


def test_a_model_that_loses_nothing_is_pruned_as_far_as_it_goes():
    assert family([layer(0, (0.0, 0.0))], Config(), PREFILL)[-1].density == pytest.approx(0.3)


def test_beside_other_rooms_connections_go_from_all_kept_to_sparsest():
    """Layer 1 has lost its attention, 1 s; thinner neurons of layer 0 save 0.5 s more."""
    slack = [layer(0, (1e-4, 1e-2)), layer(1, (1e-3, 1e-1))]
    others = Plan((Entry(layer=0, room="weights", config=Weights(rule=TopK(64), saliency="obs")),
                   Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part="attention"))))
    kept = Entry(layer=0, room="connections", config=Config(rule=Threshold((0.01, 0.01))))
    taken = Candidate(name="taken", plan=Plan((kept, *others.entries)), seconds=2 - 0.3 - 1.5, density=0.3,
                      saved={"weights": 0.5, "depth": 1.0})
    found = beside(taken, slack, Config(), PREFILL)
    assert taken in found and found[0].plan.standing("under") == Plan.everywhere([0], "connections", Config())
    assert {each.plan.standing("in") for each in found} == {others} and all(each.saved == taken.saved for each in found)
    told = {each.density: each.seconds for each in found}
    assert told == {0.5: pytest.approx(0.5), 0.3: pytest.approx(0.2), 0.15: pytest.approx(-0.1)}
    assert [each.density for each in found] == sorted((each.density for each in found), reverse=True)
    gone = Plan.everywhere((0, 1), "depth", Depth(rule=Fixed(()), part="attention"))
    bare = Candidate(name="no attention", plan=gone, seconds=0.0, density=0.0)
    assert beside(bare, slack, Config(), PREFILL) == [bare]


def test_the_uniform_family_has_one_rule_for_all_layers():
    candidates = uniform([layer(0, (1e-4, 1e-2)), layer(1, (1e-3, 1e-1))], Config(), PREFILL)
    assert [{entry.config.rule for entry in candidate.plan.entries} for candidate in candidates] == [
        set(), {Threshold(0.01)}, {Threshold(0.1)}]


@pytest.mark.parametrize("last", range(6))
def test_the_search_finds_the_last_good_candidate_in_few_judgements(last):
    judged = []

    def good(candidate) -> bool:
        judged.append(candidate)
        return candidate <= last

    assert search(list(range(6)), good) == last
    assert len(judged) <= 3 and 0 not in judged


def judged_by_density(least: float, asked: list | None = None):
    """A judge to whom a candidate is good (quality 1, else 0.5) from a density on."""
    def judge(candidate) -> Judgement:
        value = 1.0 if candidate.density >= least else 0.5
        (asked if asked is not None else []).append(candidate)
        return Judgement(quality=Quality(value=value, low=value, high=value, dense=1.0, pruned=1.0, tokens=1),
                         density={})

    return judge


SLACK = [layer(0, (1e-6, 1e-5)), layer(1, (1e-3, 1e-1))]


def test_seconds_are_foreseen_from_the_density_and_the_fitted_clock():
    sparsest = family(SLACK, Config(), PREFILL)[-1]
    assert sparsest.seconds == pytest.approx(2 * (0.1 + 0.3)) and family(SLACK, Config(), PREFILL)[0].seconds == 2.0
    assert [candidate.seconds for candidate in uniform(SLACK, Config(), PREFILL)] == pytest.approx([2.0, 1.4, 0.8])
    assert [candidate.density for candidate in uniform(SLACK, Config(), PREFILL)] == pytest.approx([1.0, 0.6, 0.3])


def test_a_layer_in_which_choosing_saves_no_time_keeps_all():
    slow = [LayerSlack(layer=0, options=[Option(rule=All(), density=[1.0], error=[0.0], seconds=0.2), *(
        Option(rule=Threshold(ratio), density=[density], error=[1e-9], seconds=0.1 + density)
        for ratio, density in zip(RATIOS, DENSITIES, strict=True))])]
    assert [candidate.plan for candidate in family(slow, Config(), PREFILL)] == [
        Plan(), Plan.everywhere([0], "connections", Config())]


def test_a_head_that_loses_much_keeps_more_than_its_neighbour():
    options = [Option(rule=All(), density=[1.0, 1.0], error=[0.0, 0.0], seconds=1.0), *(
        Option(rule=Threshold(ratio), density=[density] * 2, error=[1e-9, error], seconds=0.1 + density)
        for ratio, density, error in zip(RATIOS, DENSITIES, (1e-3, 1.0), strict=True))]
    ratios = [candidate.plan.entries[0].config.rule.ratio for candidate in
              family([LayerSlack(layer=0, options=options)], Config(), PREFILL)[2:]]
    assert (0.1, 0.01) in ratios or (0.1, 0.0) in ratios
    assert all(first >= second for first, second in ratios)


def test_a_quality_goal_gives_the_fastest_good_plan_and_below_it_the_safer_ones():
    found = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judged_by_density(0.5), FORECAST)
    seconds = [candidate.seconds for candidate in found.ladder]
    every = family(SLACK, Config(), PREFILL) + uniform(SLACK, Config(), PREFILL)
    assert seconds[0] == min(candidate.seconds for candidate in every if candidate.density >= 0.5)
    assert seconds == sorted(seconds) and found.ladder[-1].plan.entries == ()


@pytest.mark.parametrize("kind", ["price", "uniform"])
def test_the_ladder_is_of_the_kind_that_is_good_whichever_it_is(kind):
    def judge(candidate) -> Judgement:
        return judged_by_density(0.0 if candidate.name.startswith(kind) else 2.0)(candidate)

    assert solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judge, FORECAST).ladder[0].name.startswith(kind)


def test_all_that_was_judged_is_told_with_its_judgement():
    asked = []
    found = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judged_by_density(0.5, asked), FORECAST)
    assert [candidate for candidate, _ in found.judged] == asked
    assert all((judgement.quality.value == 1.0) == (candidate.density >= 0.5) for candidate, judgement in found.judged)


def test_where_nothing_is_good_the_ladder_is_dense_alone():
    found = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judged_by_density(2.0), FORECAST)
    assert [candidate.name for candidate in found.ladder] == ["dense"]


def test_a_speed_goal_gives_the_densest_plan_foreseen_to_be_fast_enough_and_then_faster_ones():
    """Of 10 s the attention is 2 s: 1.05 times as fast leaves it 2 - 10 (1 - 1 / 1.05) = 1.52 s."""
    asked = []
    found = solve(Goal(speed=1.05), PREFILL, SLACK, Config(), judged_by_density(0.5, asked), FORECAST)
    graded = family(SLACK, Config(), PREFILL)
    wanted = 2 - 10 * (1 - 1 / 1.05)
    assert found.ladder == [candidate for candidate in graded if candidate.seconds <= wanted]
    assert 1 < len(found.ladder) < len(graded) and asked == found.ladder[:1]


def test_a_speed_out_of_reach_is_tried_with_the_sparsest_plan():
    found = solve(Goal(speed=1000.0), PREFILL, SLACK, Config(), judged_by_density(0.5), FORECAST)
    assert found.ladder == family(SLACK, Config(), PREFILL)[-1:]


def decoding(number: int, errors: tuple[tuple[float, float], ...]) -> LayerSlack:
    """The same for decoding: everything kept by our kernel takes 1.1 s; errors of the two heads by option."""
    rules = [Threshold(ratio) for ratio in (0.0, *RATIOS)]
    options = [Option(rule=rule, density=[density] * 2, error=list(error), seconds=0.1 + density)
               for rule, density, error in zip(rules, (1.0, *DENSITIES), ((0.0, 0.0), *errors), strict=True)]
    return LayerSlack(layer=number, options=options)


PAGED = [decoding(0, ((1e-9, 1e-6), (1e-8, 1e-3))), decoding(1, ((1e-6, 1e-2), (1e-3, 1.0)))]


def test_for_decoding_a_layer_has_one_rule_of_one_number_and_no_layer_stays_dense():
    candidates = family(PAGED, Config(), DECODE)
    assert candidates[0].plan == Plan() and len(candidates) > 2
    for candidate in candidates[1:]:
        assert [entry.layer for entry in candidate.plan.entries] == [0, 1]
        for entry in candidate.plan.entries:
            assert isinstance(entry.config.rule, All) and entry.config.decode.ratio in (0.0, *RATIOS)
    assert candidates[-1].density == pytest.approx(0.3)
    assert any(first.config.decode.ratio > second.config.decode.ratio
               for first, second in (candidate.plan.entries for candidate in candidates[1:]))


def test_for_decoding_the_heads_of_a_layer_are_weighed_together():
    """One head that loses nothing does not carry the layer past one that loses much."""
    slack = [decoding(0, ((0.0, 1e3), (0.0, 1e3))), decoding(1, ((1e-6, 1e-6), (1e-5, 1e-5)))]
    for candidate in family(slack, Config(), DECODE)[1:-1]:
        first, second = candidate.plan.entries
        assert first.config.decode.ratio <= second.config.decode.ratio
    assert family(slack, Config(), DECODE)[1].plan.entries[0].config.decode == Threshold(0.0)


def test_for_decoding_the_uniform_family_begins_with_keeping_everything():
    candidates = uniform(PAGED, Config(), DECODE)
    assert [{entry.config.decode for entry in candidate.plan.entries} for candidate in candidates] == [
        set(), {Threshold(0.0)}, {Threshold(0.01)}, {Threshold(0.1)}]
    assert [candidate.seconds for candidate in candidates[1:]] == pytest.approx([2.2, 1.4, 0.8])


def test_a_prompt_is_foreseen_from_the_dense_seconds_and_the_attention_in_them():
    forecast = Forecast.made(SLACK, PREFILL, dense=10.0, whole=10.0)
    assert forecast == FORECAST
    assert Forecast.made(SLACK, PREFILL, dense=10.0, whole=8.0)(family(SLACK, Config(), PREFILL)[1]) == 10 / 8
    dense, *others = family(SLACK, Config(), PREFILL)
    assert forecast(dense) == 1.0
    assert [forecast(candidate) for candidate in others] == [10 / (8 + candidate.seconds) for candidate in others]


def test_decoding_is_foreseen_from_the_seconds_of_our_path_and_every_step_in_them():
    """31 steps of two layers take 31 * 2.2 s of the 100 s with everything kept."""
    forecast = Forecast.made(PAGED, DECODE, dense=120.0, whole=100.0)
    dense, kept, _, sparsest = uniform(PAGED, Config(), DECODE)
    assert DECODE.timed_runs == 31
    assert forecast(dense) == 1.0 and forecast(kept) == pytest.approx(1.2)
    assert forecast(sparsest) == pytest.approx(120 / (100 - 31 * 2.2 + 31 * 0.8))
