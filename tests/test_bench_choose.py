"""The bench of choosing: every step of it runs, and is told beside exact attention."""

from benchmarks import bench_choose


def test_every_step_has_a_line(capsys):
    lines = list(bench_choose.rows(200, 1))
    steps = [line[:2] for line in lines]
    assert [f"estimate, {estimator}" for estimator in bench_choose.ESTIMATORS] == list(dict.fromkeys(
        step for step, _ in steps if step.startswith("estimate")))
    assert {step for step, way in steps if way == "in torch"} >= {
        f"choice, {type(rule).__name__}" for rule in bench_choose.RULES}
    assert len(capsys.readouterr().out.splitlines()) == len(lines)
