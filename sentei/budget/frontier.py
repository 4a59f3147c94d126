"""Quality against speed, of every plan that was looked at: foreseen while choosing, measured where it was proved.

A plan that is only judged has a quality that was measured, on the text for choosing, and a speed-up that was not: it is
foreseen. One that is proved has both measured, its quality on other text. Each point says which it is.
"""

from sentei.budget.judge import Judgement
from sentei.budget.proof import Proof
from sentei.budget.share import drops_connections
from sentei.budget.solver import Candidate, Forecast
from sentei.conversion.plan import Plan


def foreseen(judged: list[tuple[Candidate, Judgement]], chosen: Plan | None, layers: tuple[int, ...],
             forecast: Forecast) -> list[dict]:
    """Points of the plans that were judged while choosing.

    Args:
        chosen: the plan that is delivered; None where it is not among these.
        layers: the prunable ones, for the density.
    """
    return [_point(candidate, judgement, layers, text="choose", speedup=forecast(candidate), speed="foreseen",
                   chosen=candidate.plan == chosen) for candidate, judgement in judged]


def measured(proofs: tuple[Proof, ...], chosen: Proof, layers: tuple[int, ...]) -> list[dict]:
    """Points of the plans that were proved.

    Args:
        chosen: the proof that is delivered.
    """
    return [_point(proof.candidate, proof.judgement, layers, text="verify", speedup=proof.comparison.speedup(),
                   speed="measured", chosen=proof is chosen) for proof in proofs]


def _point(candidate: Candidate, judgement: Judgement, layers: tuple[int, ...], **more) -> dict:
    rooms = {entry.room for entry in candidate.plan.entries if entry.room != "connections" or drops_connections(entry)}
    return {"name": candidate.name, "rooms": sorted(rooms), "quality": judgement.quality.value,
            "density": judgement.mean_density(layers), **more}
