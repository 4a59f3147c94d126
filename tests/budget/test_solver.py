"""The solver on made-up slack: what it must prefer, whatever the model."""

import pytest

from sentei.axes.connections import Config
from sentei.budget.slack import LayerSlack, Option
from sentei.budget.solver import family, search, uniform
from sentei.core.rules import All, Threshold

RATIOS, DENSITIES = (0.01, 0.1), (0.6, 0.3)


def layer(number: int, errors: tuple[float, float], *, late: float = 0.0) -> LayerSlack:
    """A layer of two heads that takes 0.1 + density seconds, and `late` more for its last option."""
    options = [Option(rule=All(), density=[1.0, 1.0], error=[0.0, 0.0], seconds=1.0)]
    for place, (ratio, density, error) in enumerate(zip(RATIOS, DENSITIES, errors, strict=True)):
        options.append(Option(rule=Threshold(ratio), density=[density] * 2, error=[error, error],
                              seconds=0.1 + density + late * place))
    return LayerSlack(layer=number, options=options)


def density_of(candidate, number: int) -> float:
    entry = next((entry for entry in candidate.plan.entries if entry.layer == number), None)
    ratios = (0.0, 0.0) if entry is None else entry.config.rule.ratio
    return sum(dict(zip((0.0, *RATIOS), (1.0, *DENSITIES), strict=True))[ratio] for ratio in ratios) / 2


def test_plans_go_from_dense_to_sparsest_and_only_get_faster():
    candidates = family([layer(0, (1e-4, 1e-2)), layer(1, (1e-3, 1e-1))], Config())
    seconds = [candidate.seconds for candidate in candidates]
    assert candidates[0].plan.entries == () and candidates[0].density == 1.0
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds)
    assert candidates[-1].density == pytest.approx(0.3)


def test_the_cheaper_layer_is_pruned_first():
    candidates = family([layer(0, (1e-6, 1e-5)), layer(1, (1e-1, 1.0))], Config())
    assert all(density_of(candidate, 0) <= density_of(candidate, 1) for candidate in candidates)
    assert any(density_of(candidate, 0) < density_of(candidate, 1) for candidate in candidates)


def test_a_layer_whose_clock_was_disturbed_is_pruned_like_the_others():
    slack = [layer(number, (1e-4, 1e-3), late=0.3 if number == 2 else 0.0) for number in range(6)]
    for candidate in family(slack, Config())[1:]:
        assert density_of(candidate, 2) == density_of(candidate, 0)


def test_a_model_that_loses_nothing_is_pruned_as_far_as_it_goes():
    assert family([layer(0, (0.0, 0.0))], Config())[-1].density == pytest.approx(0.3)


def test_the_uniform_family_has_one_rule_for_all_layers():
    candidates = uniform([layer(0, (1e-4, 1e-2)), layer(1, (1e-3, 1e-1))], Config())
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
