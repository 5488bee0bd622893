"""The schemes that have a name: TABLEAUX["kutta4"], and functions for the families."""

from __future__ import annotations

import math

import numpy as np

from solvers.errors import GliodeError
from solvers.ode.tableau import Tableau

_ROOT3, _ROOT6 = math.sqrt(3), math.sqrt(6)

EULER = Tableau("euler", [[0]], [1])
HEUN = Tableau("heun", [[0, 0], [1, 0]], [1 / 2, 1 / 2], b_embedded=[1, 0])  # improved Euler
KUTTA3 = Tableau("kutta3", [[0, 0, 0], [1 / 2, 0, 0], [-1, 2, 0]], [1 / 6, 2 / 3, 1 / 6])
KUTTA4 = Tableau(
    "kutta4",
    [[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]],
    [1 / 6, 1 / 3, 1 / 3, 1 / 6],
)
SSP3 = Tableau("ssp3", [[0, 0, 0], [1, 0, 0], [1 / 4, 1 / 4, 0]], [1 / 6, 1 / 6, 2 / 3])  # Shu and Osher 1988
DORMAND_PRINCE = Tableau(  # Dormand and Prince 1980
    "dormand_prince",
    [
        [0, 0, 0, 0, 0, 0, 0],
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    ],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    b_embedded=[5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40],
)
MIDPOINT = Tableau("midpoint", [[1 / 2]], [1])  # implicit midpoint, Gauss with one stage
GAUSS2 = Tableau("gauss2", [[1 / 4, 1 / 4 - _ROOT3 / 6], [1 / 4 + _ROOT3 / 6, 1 / 4]], [1 / 2, 1 / 2])
RADAU5 = Tableau(  # Radau IIA, order 5, L-stable: for stiff equations (Hairer and Wanner 1996, IV.5)
    "radau5",
    [
        [(88 - 7 * _ROOT6) / 360, (296 - 169 * _ROOT6) / 1800, (-2 + 3 * _ROOT6) / 225],
        [(296 + 169 * _ROOT6) / 1800, (88 + 7 * _ROOT6) / 360, (-2 - 3 * _ROOT6) / 225],
        [(16 - _ROOT6) / 36, (16 + _ROOT6) / 36, 1 / 9],
    ],
    [(16 - _ROOT6) / 36, (16 + _ROOT6) / 36, 1 / 9],
    # The quadrature of order 2 at the first two nodes: a careful estimate, bounded for the stiffest equation.
    b_embedded=[1 / 2 - 1 / (2 * _ROOT6), 1 / 2 + 1 / (2 * _ROOT6), 0],
)
# The Lobatto pair: IIIB is the symplectic partner of IIIA.
LOBATTO_IIIA = Tableau(
    "lobatto_iiia",
    [[0, 0, 0], [5 / 24, 1 / 3, -1 / 24], [1 / 6, 2 / 3, 1 / 6]],
    [1 / 6, 2 / 3, 1 / 6],
)
LOBATTO_IIIB = Tableau(
    "lobatto_iiib",
    [[1 / 6, -1 / 6, 0], [1 / 6, 1 / 3, 0], [1 / 6, 5 / 6, 0]],
    [1 / 6, 2 / 3, 1 / 6],
    [0, 1 / 2, 1],
)
LOBATTO = Tableau(  # q by IIIA, p by IIIB: symplectic, order 4, for any Hamiltonian
    "lobatto", LOBATTO_IIIA.A, LOBATTO_IIIA.b, A_p=LOBATTO_IIIB.A, b_p=LOBATTO_IIIB.b
)
STOERMER_VERLET = Tableau(  # p for h/2, q for h, p for h/2: explicit, symplectic where q' = f(p), p' = g(q)
    "stoermer_verlet",
    [[0, 0, 0], [0, 0, 0], [0, 1, 0]],
    [0, 1, 0],
    [0, 1 / 2, 1],
    A_p=[[0, 0, 0], [1 / 2, 0, 0], [1 / 2, 0, 0]],
    b_p=[1 / 2, 0, 1 / 2],
)


def chebyshev(stages: int, damping: float = 2 / 13) -> Tableau:
    """Runge-Kutta-Chebyshev of order 2: stable on the negative axis to h |lambda| = `real_interval(stages)`.

    Sommeijer, Shampine and Verwer 1998, equations 2.4 to 2.8, their three-term recursion written out as a
    tableau. Raises GliodeError unless stages >= 2 and damping >= 0.
    """
    if stages < 2 or not damping >= 0:
        raise GliodeError(
            f"chebyshev: {stages} stages, damping {damping}: give 2 stages or more, damping >= 0"
        )
    w0 = 1 + damping / stages**2
    T, dT, ddT = np.zeros(stages + 1), np.zeros(stages + 1), np.zeros(stages + 1)
    T[:2], dT[1] = (1, w0), 1
    for j in range(2, stages + 1):
        T[j] = 2 * w0 * T[j - 1] - T[j - 2]
        dT[j] = 2 * T[j - 1] + 2 * w0 * dT[j - 1] - dT[j - 2]
        ddT[j] = 4 * dT[j - 1] + 2 * w0 * ddT[j - 1] - ddT[j - 2]
    w1 = dT[-1] / ddT[-1]
    b = np.empty(stages + 1)
    b[2:] = ddT[2:] / dT[2:] ** 2
    b[:2] = b[2]
    rows = np.zeros((stages + 1, stages))  # X_j = x + h sum_k rows[j, k] K_k
    rows[1, 0] = b[1] * w1
    for j in range(2, stages + 1):
        ours = 2 * b[j] * w1 / b[j - 1]
        rows[j] = 2 * b[j] * w0 / b[j - 1] * rows[j - 1] - b[j] / b[j - 2] * rows[j - 2]
        rows[j, j - 1] += ours
        rows[j, 0] -= (1 - b[j - 1] * T[j - 1]) * ours
    return Tableau(f"chebyshev{stages}", rows[:-1], rows[-1] / rows[-1].sum())


def real_interval(stages: int, damping: float = 2 / 13) -> float:
    """The damped stability interval of `chebyshev`, 2/3 (s^2 - 1) (1 - 2/15 damping) (the same, eq. 2.9)."""
    return 2 / 3 * (stages**2 - 1) * (1 - 2 / 15 * damping)


TABLEAUX: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        HEUN,
        KUTTA3,
        KUTTA4,
        SSP3,
        DORMAND_PRINCE,
        MIDPOINT,
        GAUSS2,
        RADAU5,
        LOBATTO_IIIA,
        LOBATTO_IIIB,
        LOBATTO,
        STOERMER_VERLET,
    )
}


def tableau(scheme: str | Tableau) -> Tableau:
    """The tableau of a name ("chebyshevN" for N stages), or the given one."""
    if isinstance(scheme, Tableau):
        return scheme
    if scheme in TABLEAUX:
        return TABLEAUX[scheme]
    count = scheme.removeprefix("chebyshev")
    if count != scheme and count.isdigit():
        return chebyshev(int(count))
    raise GliodeError(f"scheme {scheme!r} is not one of {', '.join(TABLEAUX)}, chebyshevN (N stages)")
