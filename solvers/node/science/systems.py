r"""Systems of ordinary differential equations, as a science-activated network takes them.

A system is a function `field(t, x, **parameters)` of states x (..., d), one state or a batch, whose keyword
defaults are the values of its source; a parameter is a number or a tensor, one for all states () or, for a
batch (n, d), one for each (n, 1). `SYSTEMS` has for each its states and their units, its parameters and
theirs, a start and a duration:

    lotka_volterra     predator and prey
    sir                an epidemic in a closed population
    lorenz             convection, chaotic
    kuznetsov          immune cells and a tumour
    pharmacokinetics   a drug taken by mouth, two compartments
    robertson          autocatalysis, stiff
    van_der_pol        a relaxation oscillation, stiff for large mu

Stiff ones want an implicit scheme and steps that follow the solution: "radau5" on a graded grid or on that of
`solvers.ode.adaptive.adaptive_grid`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from solvers.errors import GliodeError

Number = float | Tensor


def lotka_volterra(
    t: Number,
    x: Tensor,
    alpha: Number = 2 / 3,
    beta: Number = 4 / 3,
    gamma: Number = 1.0,
    delta: Number = 1.0,
) -> Tensor:
    r"""Prey u and predators v (Lotka 1920, Volterra 1926): u' = alpha u - beta u v, v' = delta u v - gamma v.

    delta u - gamma log u + beta v - alpha log v is conserved.
    """
    u, v = _parts(x, 2, "lotka_volterra")
    return torch.cat([alpha * u - beta * u * v, delta * u * v - gamma * v], -1)


def sir(t: Number, x: Tensor, beta: Number = 0.4, gamma: Number = 0.1) -> Tensor:
    r"""Shares of susceptible, infectious and removed people (Kermack and McKendrick 1927):

        S' = -beta S I,    I' = beta S I - gamma I,    R' = gamma I.

    S + I + R and I + S - (gamma / beta) log S are conserved.
    """
    S, I, _ = _parts(x, 3, "sir")
    infected, removed = beta * S * I, gamma * I
    return torch.cat([-infected, infected - removed, removed], -1)


def lorenz(t: Number, x: Tensor, sigma: Number = 10.0, rho: Number = 28.0, beta: Number = 8 / 3) -> Tensor:
    r"""Convection in three modes (Lorenz 1963): x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z.

    The divergence of the flow is -(sigma + 1 + beta): volumes shrink at that rate while trajectories part.
    """
    X, Y, Z = _parts(x, 3, "lorenz")
    return torch.cat([sigma * (Y - X), X * (rho - Z) - Y, X * Y - beta * Z], -1)


def kuznetsov(
    t: Number,
    x: Tensor,
    sigma: Number = 0.1181,
    rho: Number = 1.131,
    eta: Number = 20.19,
    mu: Number = 0.00311,
    delta: Number = 0.3743,
    alpha: Number = 1.636,
    beta: Number = 0.002,
) -> Tensor:
    r"""Effector cells E and tumour cells T, both in units of 10^6 cells (Kuznetsov, Makalkin, Taylor and
    Perelson 1994, the nondimensional form with the parameters fitted to a lymphoma in mice):

        E' = sigma + rho E T / (eta + T) - mu E T - delta E,    T' = alpha T (1 - beta T) - E T.

    Time in units of 1 / 0.1101 days = 9.08 days. Of the four equilibria a small tumour (1.61, 8.19), dormant,
    and a large one (0.173, 447) are stable.
    """
    E, T = _parts(x, 2, "kuznetsov")
    immune = sigma + rho * E * T / (eta + T) - mu * E * T - delta * E
    return torch.cat([immune, alpha * T * (1 - beta * T) - E * T], -1)


def pharmacokinetics(
    t: Number,
    x: Tensor,
    absorption: Number = 1.5,
    elimination: Number = 0.15,
    outward: Number = 0.6,
    back: Number = 0.25,
) -> Tensor:
    r"""Amounts of a drug in gut, centre (blood) and periphery (tissue), first order throughout:

        g' = -absorption g,    c' = absorption g - elimination c - p',    p' = outward c - back p.

    Values typical of a drug of a few hours' half-life, of no source. Linear: x(t) = exp(A t) x(0).
    """
    gut, centre, periphery = _parts(x, 3, "pharmacokinetics")
    absorbed, net = absorption * gut, outward * centre - back * periphery
    return torch.cat([-absorbed, absorbed - elimination * centre - net, net], -1)


def robertson(t: Number, x: Tensor, k1: Number = 0.04, k2: Number = 3e7, k3: Number = 1e4) -> Tensor:
    r"""Shares of three reactants, A -> B, 2 B -> B + C, B + C -> A + C (Robertson 1966):

        a' = -k1 a + k3 b c,    b' = k1 a - k3 b c - k2 b^2,    c' = k2 b^2.

    a + b + c is conserved; rates from 10^-2 to 10^4 a second.
    """
    a, b, c = _parts(x, 3, "robertson")
    first, second, third = k1 * a, k2 * b**2, k3 * b * c
    return torch.cat([third - first, first - third - second, second], -1)


def van_der_pol(t: Number, x: Tensor, mu: Number = 1000.0) -> Tensor:
    r"""q' = p, p' = mu^2 ((1 - q^2) p - q) (van der Pol 1926): time in units of mu, that of the slow phase.

    Its period tends to 3 - 2 log 2 as mu grows.
    """
    q, p = _parts(x, 2, "van_der_pol")
    return torch.cat([p, mu**2 * ((1 - q**2) * p - q)], -1)


def _parts(x: Tensor, d: int, name: str) -> tuple[Tensor, ...]:
    """The d components (..., 1)."""
    if x.shape[-1:] != (d,):
        raise GliodeError(f"{name}: a state has {d} components in its last dimension, not {tuple(x.shape)}")
    return x.split(1, -1)


@dataclass(frozen=True)
class System:
    """A system and what it is about.

    field: f(t, x, **parameters); states and units: {name: unit} of the components of x and of the parameters
    ("1": a pure number); time: the unit of t; start: x(0); duration: how long it shows what it is known for.
    """

    field: Callable[..., Tensor]
    states: Mapping[str, str]
    units: Mapping[str, str]
    time: str
    start: tuple[float, ...]
    duration: float

    @cached_property
    def parameters(self) -> dict[str, float]:
        """{name: value} of the source: the keyword defaults of the field."""
        known = list(inspect.signature(self.field).parameters.values())[2:]
        return {parameter.name: float(parameter.default) for parameter in known}

    @property
    def x0(self) -> Tensor:
        """The start as a tensor (d,)."""
        return torch.tensor(self.start, dtype=torch.float64)


SYSTEMS: dict[str, System] = {
    "lotka_volterra": System(
        lotka_volterra,
        {"prey": "1", "predators": "1"},
        {"alpha": "1", "beta": "1", "gamma": "1", "delta": "1"},
        "1",
        (1.0, 0.8),
        15.0,
    ),
    "sir": System(
        sir,
        {"susceptible": "1", "infectious": "1", "removed": "1"},
        {"beta": "1/day", "gamma": "1/day"},
        "day",
        (0.999, 0.001, 0.0),
        80.0,
    ),
    "lorenz": System(
        lorenz,
        {"x": "1", "y": "1", "z": "1"},
        {"sigma": "1", "rho": "1", "beta": "1"},
        "1",
        (-8.0, 7.0, 27.0),
        2.0,
    ),
    "kuznetsov": System(
        kuznetsov,
        {"effector": "1e6 cells", "tumour": "1e6 cells"},
        dict.fromkeys(("sigma", "rho", "eta", "mu", "delta", "alpha", "beta"), "1"),
        "9.08 days",
        (1.0, 50.0),
        15.0,
    ),
    "pharmacokinetics": System(
        pharmacokinetics,
        {"gut": "mg", "centre": "mg", "periphery": "mg"},
        dict.fromkeys(("absorption", "elimination", "outward", "back"), "1/h"),
        "h",
        (100.0, 0.0, 0.0),
        24.0,
    ),
    "robertson": System(
        robertson,
        {"a": "1", "b": "1", "c": "1"},
        dict.fromkeys(("k1", "k2", "k3"), "1/s"),
        "s",
        (1.0, 0.0, 0.0),
        40.0,
    ),
    "van_der_pol": System(van_der_pol, {"q": "1", "p": "1"}, {"mu": "1"}, "mu", (2.0, 0.0), 2.0),
}
