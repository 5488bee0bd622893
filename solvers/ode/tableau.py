r"""Butcher tableaux: a Runge-Kutta scheme as its coefficients, and what follows from them.

    X_i = x_n + h sum_j a_ij K_j,    K_i = f(t_n + c_i h, X_i),    x_(n+1) = x_n + h sum_i b_i K_i.

A partitioned scheme has a second pair (A_p, b_p) for the second half of the state, x = (q, p).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from solvers.errors import GliodeError

Array = NDArray[np.float64]
Matrix = Sequence[Sequence[float]]

# Rooted trees up to order 4, each as the tuple of its children (Hairer, Lubich, Wanner 2006, table III.1.1),
# and their density gamma: the order condition of a tree is "elementary weight = 1 / gamma".
Tree = tuple["Tree", ...]
_TREES: dict[int, tuple[tuple[Tree, int], ...]] = {
    1: (((), 1),),
    2: ((((),), 2),),
    3: ((((), ()), 3), ((((),),), 6)),
    4: (
        (((), (), ()), 4),
        (((), ((),)), 8),
        ((((), ()),), 12),
        (((((),),),), 24),
    ),
}
TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Tableau:
    """The coefficients of a Runge-Kutta scheme with s stages.

    A (s, s), b (s,), c (s,; None: the row sums of A); b_embedded: weights of the embedded scheme whose
    difference to b estimates the error; A_p, b_p: for the second half p of a state x = (q, p), whose first
    half q takes A and b. Raises GliodeError where shapes, finite numbers, sum b = 1 or the row sums
    c_i = sum_j a_ij do not hold.
    """

    name: str
    A: Array
    b: Array
    c: Array
    b_embedded: Array | None
    A_p: Array | None
    b_p: Array | None

    def __init__(
        self,
        name: str,
        A: Matrix | Array,
        b: Sequence[float] | Array,
        c: Sequence[float] | Array | None = None,
        b_embedded: Sequence[float] | Array | None = None,
        A_p: Matrix | Array | None = None,
        b_p: Sequence[float] | Array | None = None,
    ) -> None:
        def array(key: str, value: Matrix | Sequence[float] | Array, shape: tuple[int, ...]) -> Array:
            try:
                found = np.array(value, dtype=np.float64)
            except ValueError as error:
                raise GliodeError(f"tableau {name}: {key} is not an array of numbers: {error}") from error
            if found.shape != shape or not np.isfinite(found).all():
                raise GliodeError(
                    f"tableau {name}: {key} must be {' x '.join(map(str, shape))} finite numbers, "
                    f"its shape is {found.shape}"
                )
            found.flags.writeable = False
            return found

        stages = len(b)
        if stages < 1:
            raise GliodeError(f"tableau {name}: b is empty; a scheme has at least one stage")
        if (A_p is None) != (b_p is None):
            raise GliodeError(f"tableau {name}: a partitioned scheme needs both A_p and b_p")
        square, row = (stages, stages), (stages,)
        values = {
            "name": name,
            "A": array("A", A, square),
            "b": array("b", b, row),
            "b_embedded": None if b_embedded is None else array("b_embedded", b_embedded, row),
            "A_p": None if A_p is None else array("A_p", A_p, square),
            "b_p": None if b_p is None else array("b_p", b_p, row),
        }
        values["c"] = values["A"].sum(1) if c is None else array("c", c, row)  # type: ignore[union-attr]
        for key, value in values.items():
            object.__setattr__(self, key, value)
        for key in ("b", "b_embedded", "b_p"):
            weights = getattr(self, key)
            if weights is not None and abs(weights.sum() - 1) > TOLERANCE:
                raise GliodeError(
                    f"tableau {name}: {key} sums to {weights.sum():.15g}, a consistent scheme's to 1"
                )
        if not self.partitioned and np.abs(self.A.sum(1) - self.c).max() > TOLERANCE:
            raise GliodeError(
                f"tableau {name}: the row sums of A are {self.A.sum(1).tolist()}, c is {self.c.tolist()}: "
                "they must be equal (leave c out to take the row sums)"
            )

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def partitioned(self) -> bool:
        """Whether q and p of a state (q, p) have coefficients of their own."""
        return self.A_p is not None

    @cached_property
    def explicit(self) -> bool:
        """Whether each stage needs the earlier ones only."""
        return all(not np.triu(A).any() for A in (self.A, self.A_p) if A is not None)

    @cached_property
    def conditions(self) -> dict[int, float]:
        """Order p -> the largest residual of its order conditions, p = 1 to 4.

        Partitioned: of the two-coloured trees; where it is explicit too, of those whose neighbours differ in
        colour, which are all there are for q' = f(p), p' = g(q) (Hairer, Lubich, Wanner 2006, section III.2).
        """
        matrices = [self.A] if self.A_p is None else [self.A, self.A_p]
        weights = [self.b] if self.b_p is None else [self.b, self.b_p]

        colours = range(len(matrices))
        separable = self.partitioned and self.explicit

        def elementary(tree: Tree, parent: int) -> list[Array]:
            """prod over the children of A_colour (what is below), for every colouring of what is below."""
            found: list[Array] = [np.ones(self.stages)]
            for child in tree:
                below = [
                    matrices[colour] @ weight
                    for colour in colours
                    if not (separable and colour == parent)
                    for weight in elementary(child, colour)
                ]
                found = [a * b for a in found for b in below]
            return found

        return {
            order: max(
                abs(float(weights[root] @ weight) - 1 / gamma)
                for tree, gamma in trees
                for root in colours
                for weight in elementary(tree, root)
            )
            for order, trees in _TREES.items()
        }

    @property
    def order(self) -> int:
        """The order, looked for up to 4: 4 says 4 or more."""
        order = 0
        while order < 4 and self.conditions[order + 1] < 1e-10:
            order += 1
        return order

    def report(self) -> str:
        """One line for each order condition, and what the scheme is good for."""
        lines = [f"{self.name}: {self.stages} stages, {'explicit' if self.explicit else 'implicit'}"]
        lines += [
            f"  order {p}: {'holds' if p <= self.order else 'fails'} (largest residual {residual:.1e})"
            for p, residual in self.conditions.items()
        ]
        radius = self.contractivity_radius
        lines.append(f"  circle-contractivity radius: {radius:g}" if radius else "  no circle contractivity")
        return "\n".join(lines)

    @cached_property
    def contractivity_radius(self) -> float:
        r"""The largest r for which B A + A^T B - b b^T + B / r is positive semi-definite, B = diag(b).

        A step h keeps a contraction <f(x) - f(y), x - y> <= -nu ||f(x) - f(y)||^2 where h <= 2 nu r
        (Dahlquist and Jeltsch 1979). 0 where some b_i <= 0 or the scheme is partitioned; infinite where it is
        algebraically stable.
        """
        if self.partitioned or (self.b <= 0).any():
            return 0.0
        half = np.sqrt(self.b)
        weighted = self.b[:, None] * self.A
        algebraic = (weighted + weighted.T - np.outer(self.b, self.b)) / np.outer(half, half)
        lowest = float(np.linalg.eigvalsh(algebraic)[0])
        return math.inf if lowest > -TOLERANCE else -1 / lowest

    @cached_property
    def real_interval(self) -> float:
        """The l for which |R(z)| <= 1 on [-l, 0], R(z) = 1 + z b^T (1 - z A)^-1 1; of an explicit scheme.

        Sampled to z = -2.2 s^2, beyond the 2 s^2 that no consistent scheme of s stages exceeds.
        """
        z = -np.linspace(0, 2.2 * self.stages**2, max(4000, 400 * self.stages))
        K = np.ones((self.stages, len(z)))
        for i in range(1, self.stages):
            K[i] += z * (self.A[i, :i] @ K[:i])
        outside = np.flatnonzero(np.abs(1 + z * (self.b @ K)) > 1 + 1e-9)
        return float(-z[outside[0] - 1])

    def partner(self) -> Tableau:
        r"""The symplectic partner, the scheme of the exact discrete adjoint:

            b~_i = b_i,    b_i a~_ij + b~_j a_ji - b_i b~_j = 0

        (Sanz-Serna 2016, theorem 3.4). Raises GliodeError where some b_i = 0: then there is none, and the
        gradient comes from the undivided recursion.
        """
        if self.partitioned:
            raise GliodeError(f"tableau {self.name}: partner() is for schemes with one pair (A, b)")
        if (self.b == 0).any():
            raise GliodeError(
                f"tableau {self.name}: no symplectic partner, since b has a zero; its gradient needs none "
                "(integrate(..., gradient='adjoint') uses the undivided recursion)"
            )
        A = self.b[None, :] - self.b[None, :] * self.A.T / self.b[:, None]
        return Tableau(f"partner of {self.name}", A, self.b)
