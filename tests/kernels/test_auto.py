"""What `auto` takes for the plan that is everything: the faster of two clocks, and nothing measured under a mode."""

from dataclasses import replace

import pytest
import torch

from sentei.kernels import gains, native
from sentei.kernels.attention import Grid, Tiles, auto, choose_impl

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
TOKENS = auto.SHORTEST
DENSE = Tiles(grid=Grid(num_queries=TOKENS, num_keys=TOKENS, query_block=64, key_block=64, causal=True))


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setattr(gains, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(gains, "_known", {})


def clock(monkeypatch, eager_s: float, fused_s: float) -> None:
    """Kernels that do nothing but take their time, by a clock that they move."""
    now = [0.0]

    def taking(seconds):
        def attend(*given, **named):
            now[0] += seconds
        return attend

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(auto.eager, "attend", taking(eager_s))
    monkeypatch.setattr(auto.fused_cpp, "attend", taking(fused_s))


def tensors():
    return [torch.randn(1, TOKENS, heads, 8) for heads in (4, 2, 2)]


@pytest.mark.parametrize(("eager_s", "fused_s", "name", "gain"), [
    (3.0, 2.0, "fused_cpp", "1.50"), (2.0, 3.0, "eager", "0.67"), (1.01, 1.0, "eager", "1.01")])
def test_it_takes_the_faster_and_says_by_how_much(monkeypatch, eager_s, fused_s, name, gain):
    clock(monkeypatch, eager_s, fused_s)
    with torch.no_grad():
        assert choose_impl("auto", *tensors(), DENSE) == (
            name, f"measured here: fused_cpp is {gain} times as fast as torch's own kernel")


def test_nothing_is_measured_under_a_mode_and_so_nothing_wrong_is_remembered(monkeypatch):
    clock(monkeypatch, 3.0, 2.0)
    given = tensors()
    for mode in (torch.autocast("cpu"), torch._subclasses.FakeTensorMode(), torch.device("meta")):
        with torch.no_grad(), mode:
            assert choose_impl("auto", *given, DENSE)[0] == "eager"
    assert not gains._known and not gains._path().exists()
    with torch.no_grad():
        assert choose_impl("auto", *given, DENSE)[0] == "fused_cpp"


@pytest.mark.parametrize(("queries", "keys"), [(0, 2 * TOKENS), (2 * TOKENS, 0)])
def test_nothing_is_measured_where_there_is_nothing_to_attend_to(monkeypatch, queries, keys):
    clock(monkeypatch, 3.0, 2.0)
    given = [torch.randn(1, tokens, 2, 8) for tokens in (queries, keys, keys)]
    grid = replace(DENSE.grid, num_queries=queries, num_keys=keys, causal=False)
    assert choose_impl("auto", *given, Tiles(grid=grid))[0] == "eager" and not gains._known


@pytest.mark.parametrize("change", [
    {"heads": (4, 4)}, {"widths": (8, 16)}, {"dtype": torch.bfloat16}, {"causal": False}, {"tokens": 2 * TOKENS},
    {"queries": 1}], ids=str)
def test_every_kind_of_call_is_measured_for_itself_and_remembered_beyond_the_process(monkeypatch, change):
    clock(monkeypatch, 3.0, 2.0)

    def chosen(heads=(4, 2), widths=(8, 8), dtype=torch.float32, causal=True, tokens=TOKENS, queries=None):
        rows = queries or tokens
        given = [torch.randn(1, *shape).to(dtype) for shape in (
            (rows, heads[0], widths[0]), (tokens, heads[1], widths[0]), (tokens, heads[1], widths[1]))]
        with torch.no_grad():
            return choose_impl("auto", *given, Tiles(grid=replace(
                DENSE.grid, num_queries=rows, num_keys=tokens, causal=causal)))

    first = chosen()
    clock(monkeypatch, 1.0, 2.0)
    assert chosen() == first and first[0] == "fused_cpp"
    gains.forget()
    assert chosen() == ("fused_cpp", "measured here before: fused_cpp is 1.50 times as fast as torch's own kernel")
    assert chosen(**change)[0] == "eager"


@pytest.mark.parametrize("change", [
    {"window": 64}, {"lengths": torch.tensor([[0, TOKENS]])}, {"num_queries": 40}], ids=str)
def test_where_torchs_kernel_would_need_a_mask_ours_is_taken_unmeasured(change, monkeypatch):
    clock(monkeypatch, 1.0, 9.0)
    query, key, value = tensors()
    tiles = Tiles(grid=replace(DENSE.grid, **change))
    query = query[:, :tiles.grid.num_queries]
    assert choose_impl("auto", query, key, value, tiles) == (
        "fused_cpp", "torch's own kernel needs a mask of every pair for this plan")
    assert choose_impl("auto", query.double(), key.double(), value.double(), tiles)[0] == "eager"


def test_what_is_trained_is_measured_with_its_gradients(monkeypatch):
    """A kernel whose backward is slow."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, seconds):
            ctx.seconds = seconds
            now[0] += 1.0
            return query * 1.0

        @staticmethod
        def backward(ctx, gradient):
            now[0] += ctx.seconds
            return gradient, None

    def attend(seconds):
        return lambda query, key, value, *_, **__: Slow.apply(query, seconds) + 0 * (key.sum() + value.sum())

    monkeypatch.setattr(auto.eager, "attend", attend(5.0))
    monkeypatch.setattr(auto.fused_cpp, "attend", attend(2.0))
    query, key, value = tensors()
    for wanted, name, gain in ((False, "eager", "1.00"), (True, "fused_cpp", "2.00")):
        found = choose_impl("auto", query.requires_grad_(wanted), key, value, DENSE)
        assert found == (name, f"measured here: fused_cpp is {gain} times as fast as torch's own kernel")


@pytest.mark.parametrize("blocks", [{"query_block": 128}, {"key_block": 32}], ids=str)
def test_blocks_of_any_size_are_measured_for_themselves(blocks, monkeypatch):
    clock(monkeypatch, 3.0, 2.0)
    with torch.no_grad():
        assert choose_impl("auto", *tensors(), Tiles(grid=replace(DENSE.grid, **blocks)))[0] == "fused_cpp"
        clock(monkeypatch, 2.0, 3.0)
        assert choose_impl("auto", *tensors(), DENSE)[0] == "eager"


def test_the_log_sum_exp_of_everything_is_ours_to_make():
    assert choose_impl("auto", *tensors(), DENSE, return_lse=True)[0] == "fused_cpp"
