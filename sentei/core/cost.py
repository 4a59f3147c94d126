"""What a choice costs: multiply-adds and bytes, for what is kept and for what could have been."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic and traffic of one call.

    Args:
        multiply_adds: performed (two FLOPs each).
        dense_multiply_adds: what keeping every permitted candidate would perform.
        bytes: read and written, each operand counted once.
        choosing: multiply-adds spent on the scores that chose; not a part of `multiply_adds`.
    """

    multiply_adds: int
    dense_multiply_adds: int
    bytes: int = 0
    choosing: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(multiply_adds=self.multiply_adds + other.multiply_adds,
                    dense_multiply_adds=self.dense_multiply_adds + other.dense_multiply_adds,
                    bytes=self.bytes + other.bytes, choosing=self.choosing + other.choosing)

    def density(self) -> float:
        """Performed ÷ dense; 1.0 when there was nothing to do."""
        return self.multiply_adds / self.dense_multiply_adds if self.dense_multiply_adds else 1.0
