"""Agreement is the Jaccard index of what is kept; a shared prefix agrees wholly, and one changed bit is noticed."""

import pytest
import torch
from circuits import observed, ran, spelled
from tiny import tiny_model

from sentei.circuit.agreement import ROOMS, agreement, aligned, kept_keys, prefix_differences, shared_prefix
from sentei.circuit.bits import unpack
from sentei.circuit.capture import capture
from sentei.circuit.run import Run, Token


def tokens_of(*numbers):
    run = ran().runs[0]
    return Run(**{**vars(run), "tokens": tuple(Token(id=number, text="") for number in numbers)})


@pytest.mark.parametrize(("first", "second", "pairs"), [
    ((1, 2, 3), (1, 2, 3), [(0, 0), (1, 1), (2, 2)]),
    ((1, 2, 9, 3), (1, 2, 8, 3), [(0, 0), (1, 1), (2, 2), (3, 3)]),
    ((1, 9, 3), (1, 8, 8, 3), [(0, 0), (2, 3)]),
    ((7, 8), (9,), []),
])
def test_tokens_are_matched(first, second, pairs):
    assert aligned(tokens_of(*first), tokens_of(*second)) == pairs


def test_a_shared_prefix_is_identical_and_a_changed_bit_is_not():
    first, second = observed().runs
    assert shared_prefix(first, second) == 6 and prefix_differences(first, second) == 0
    for part, place in (("1.heads.bits", (5, 0)), ("2.experts.bits", (0, 1)), ("0.connections.bits", (1, 2))):
        changed = first.tensors[part].clone()
        changed[place] = changed[place] ^ 1
        other = Run(**{**vars(first), "tensors": {**first.tensors, part: changed}})
        assert prefix_differences(other, second) == 1, part


def test_agreement_by_hand():
    first, second = observed().runs
    pairs = aligned(first, second)
    found = agreement(first, second, [(5, 5), (8, 8)])
    assert found.shape == (3, len(ROOMS), 2) and bool((found[:, :, 0] == 1).all())
    partner = dict(pairs)
    for layer in range(3):
        one, other = kept_keys(first, layer), kept_keys(second, layer)
        mine = {(head, partner.get(key, -1 - key)) for head, key in one[:, 8].nonzero().tolist()}
        yours = {tuple(place) for place in other[:, 8].nonzero().tolist()}
        assert found[layer, 0, 1] == pytest.approx(len(mine & yours) / len(mine | yours))
        mine, yours = (unpack(run.get(layer, "experts.bits")[8], 16) for run in (first, second))
        assert found[layer, 2, 1] == pytest.approx(int((mine & yours).sum()) / int((mine | yours).sum()))
    assert bool((found[:, 0, 1] < 1).any())


def test_a_run_agrees_with_itself():
    run = ran().runs[0]
    found = agreement(run, run, [(place, place) for place in range(10)])
    assert bool((found[:, [0, 2, 3]] == 1).all()) and bool(found[:, 1].isnan().all())


def test_later_tokens_change_nothing_before_them():
    """In a causal model, whatever the lengths: the prompt alone, and the prompt with more behind it."""
    model, prompt = tiny_model("llama"), [5, 6, 7, 8, 9]
    circuit = capture(model, [prompt, [*prompt, *range(100, 131)]], spelled)
    assert prefix_differences(*circuit.runs) == 0
    moved = capture(model, [[4, *prompt], [3, *prompt]], spelled)
    assert bool((agreement(*moved.runs, [(5, 5)])[:, 0] < 1).any())


def test_a_run_in_which_less_was_chosen_can_be_compared():
    first, second = observed().runs
    bare = Run(**{**vars(second), "tensors": {name: part for name, part in second.tensors.items()
                                              if "connections" not in name}})
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    missing = sum(int((~kept_keys(first, layer, 6)[..., :6] & seen).sum()) for layer in range(3))
    assert missing > 0 and prefix_differences(first, bare) == prefix_differences(bare, first) == missing


def test_nothing_chosen_is_everything_kept():
    run = Run(**{**vars(ran().runs[0]), "tensors": {}})
    assert torch.equal(kept_keys(run, 0)[0], torch.ones(10, 10, dtype=torch.bool).tril())
