"""Systems of species: go-or-grow in one dimension, a spheroid with a necrotic core in three."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar
from torch import Tensor

from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import fits
from solvers.fem.equations.species import on_domain
from solvers.fem.mesh import Domain, box, interval
from solvers.node.science.species import GoOrGrow, Necrosis

Array = NDArray[np.float64]

# ---- Go or grow: D of proliferative cells 0, of invasive ones D, constant rates of switching ---------------
LENGTH = 200.0  # mm
D = 0.3  # mm^2/day
RATES = {"growth": 0.1, "invasive_growth": 0.0, "go": 0.15, "grow": 0.05}  # 1/day


def linear_speed() -> tuple[float, float]:
    """The speed of the front that its leading edge pulls, and its steepness, from the dispersion relation.

    c = min over lambda of mu(lambda) / lambda, mu the largest eigenvalue of the linearisation at 0 for
    exp(-lambda (x - c t)).
    """
    rho, go, grow = RATES["growth"], RATES["go"], RATES["grow"]

    def speed(steepness: float) -> float:
        matrix = np.array([[rho - go, grow], [go, D * steepness**2 - grow]])
        return float(np.linalg.eigvals(matrix).real.max()) / steepness

    found = minimize_scalar(speed, bounds=(1e-2, 10.0), method="bounded", options={"xatol": 1e-10})
    return float(found.fun), float(found.x)


def invade(domain: Domain, dt: float, times: list[float], **rates: Tensor | float) -> list[Tensor]:
    """p and i, (2, n), at the times, from a seed at the left end."""
    species = on_domain(domain, GoOrGrow())
    seed = domain.interpolate(lambda x: 0.5 * np.exp(-(x[:, 0] ** 2) / 18))
    u, now, found = torch.stack([seed, 0 * seed]), 0.0, []
    mobility = torch.tensor([0.0, D], dtype=torch.float64)
    for time in times:
        u = species.evolve(u, time - now, max(1, round((time - now) / dt)), mobility, **(RATES | rates))
        now = time
        found.append(u)
    return found


def front(domain: Domain, u: Tensor, level: float = 0.1) -> float:
    """Where p + i falls through a level, linear between the vertices."""
    order = np.argsort(domain.points[:, 0])
    x, n = domain.points[order, 0], u.sum(0).numpy()[order]
    last = int(np.flatnonzero(n > level).max())
    return float(x[last] + (x[last + 1] - x[last]) * (n[last] - level) / (n[last] - n[last + 1]))


def go_or_grow() -> Row:
    """The front's speed against the dispersion relation; the rates from noisy total densities."""
    speed, steepness = linear_speed()
    times = [150.0, 600.0]
    # A pulled front lags by 3 / (2 lambda) log t behind its speed (Bramson 1983).
    expected = speed * (times[1] - times[0]) - 1.5 / steepness * math.log(times[1] / times[0])
    moved = []
    for cells, dt in ((200, 4.0), (400, 2.0), (800, 1.0)):
        domain = interval(LENGTH, cells)
        early, late = (front(domain, u) for u in invade(domain, dt, times))
        moved.append(late - early)
    order = math.log2(abs(moved[0] - moved[1]) / abs(moved[1] - moved[2]))
    names, domain = ("growth", "go", "grow"), interval(60.0, 120)
    seen = np.linspace(0, 60, 121)

    def observed(domain: Domain, dt: float, **rates: Tensor | float) -> Tensor:
        where = torch.from_numpy(np.argmin(np.abs(domain.points[:, :1] - seen), axis=0))
        return torch.stack([u[:, where] for u in invade(domain, dt, [40.0, 80.0, 120.0], **rates)])

    def forward(values: Tensor) -> Tensor:
        return observed(domain, 4.0, **dict(zip(names, values.unbind(), strict=True)))

    truth = {name: RATES[name] for name in names}
    found = fits(
        forward, observed(interval(60.0, 480), 1.0), truth, {"growth": 0.15, "go": 0.1, "grow": 0.08}
    )
    note = (
        f"front moved from day {times[0]:g} to {times[1]:g}: {moved[-1]:.1f} mm, of {expected:.1f} by the "
        f"linear speed {speed:.4f} mm/day and Bramson's lag; order: Richardson's, of that; data: p and i at "
        "121 points and 3 times, from a mesh 4 times finer"
    )
    error = abs(moved[-1] / expected - 1)
    return Row("go or grow, 1-D", "speed of the pulled front", error, 0.02, order, 2.0, found, note)


# ---- A spheroid: proliferating cells, necrotic core, nutrient ----------------------------------------------
SIDE, TIMES = 20.0, (6.0, 12.0)  # mm, days
MOBILITY = (0.1, 0.0, 2.0)  # mm^2/day
NECROSIS = {"growth": 0.5, "death": 0.3, "uptake": 2.0, "supply": 0.3}  # 1/day


def seeded(r2: Array) -> Array:
    """Proliferating, necrotic, nutrient at squared radii (n,): (3, n)."""
    p = 0.6 * np.exp(-r2 / 12.5)
    return np.stack([p, 0 * p, 1 + 0 * p])


def radial(cells: int = 500, reach: float = 1.25 * SIDE) -> tuple[Array, Array]:
    """The spheroid by finite volumes in r and an implicit solver of SciPy: radii and (times, 3, cells)."""
    faces = np.linspace(0, reach, cells + 1)
    r, volumes, areas = (faces[1:] + faces[:-1]) / 2, np.diff(faces**3) / 3, faces[1:-1] ** 2
    reaction = Necrosis()
    rates = [torch.tensor(NECROSIS[name], dtype=torch.float64) for name in reaction.parameters]

    def slope(t: float, y: Array) -> Array:
        u = y.reshape(3, cells)
        flux = areas * np.diff(u, axis=1) / np.diff(r) * np.array(MOBILITY)[:, None]
        spread = np.diff(np.pad(flux, ((0, 0), (1, 1))), axis=1) / volumes
        found: Array = (spread + reaction.rates(torch.from_numpy(u), *rates).numpy()).ravel()
        return found

    near = np.eye(cells) + np.eye(cells, k=1) + np.eye(cells, k=-1)
    sparsity = np.kron(np.ones((3, 3)), np.eye(cells)) + np.kron(np.eye(3), near)
    done = solve_ivp(
        slope,
        (0, TIMES[-1]),
        seeded(r**2).ravel(),
        "BDF",
        TIMES,
        rtol=1e-7,
        atol=1e-9,
        jac_sparsity=sparsity,
    )
    return r, done.y.T.reshape(len(TIMES), 3, cells)


def spheroid(domain: Domain, steps: int, **rates: Tensor | float) -> list[Tensor]:
    """The states (3, n) at TIMES, `steps` apart, on an octant."""
    species = on_domain(domain, Necrosis())
    u, found, now = torch.from_numpy(seeded((domain.points**2).sum(1))), [], 0.0
    D = torch.tensor(MOBILITY, dtype=torch.float64)
    for time in TIMES:
        u, now = species.evolve(u, time - now, steps, D, **(NECROSIS | rates)), time
        found.append(u)
    return found


def octant(n: int) -> Domain:
    """n^3 voxels, the tumour's centre in a corner."""
    return box((SIDE,) * 3, (n,) * 3)


def necrosis(full: bool) -> Row:
    """The spheroid against its radial form; rates from noisy densities, the nutrient unseen."""
    r, states = radial()

    def exact(domain: Domain, k: int) -> Tensor:
        at = np.sqrt((domain.points**2).sum(1))
        return torch.from_numpy(np.stack([np.interp(at, r, one) for one in states[k]]))

    errors = []
    for n, steps in ((15, 12), (30, 24), *([(60, 48)] if full else [])):
        domain = octant(n)
        u, true = spheroid(domain, steps)[-1], exact(domain, -1)
        norms = [math.sqrt(domain.integral(x**2)) for x in (*(u - true), *true)]
        errors.append(max(e / size for e, size in zip(norms[:3], norms[3:], strict=True)))
    order = math.log2(errors[-2] / errors[-1])
    domain, names = octant(15), ("growth", "death", "uptake")
    seen = torch.from_numpy(np.flatnonzero((domain.points**2).sum(1) < 144.0))

    def forward(values: Tensor) -> Tensor:
        given = dict(zip(names, values.unbind(), strict=True))
        return torch.stack([u[:2, seen] for u in spheroid(domain, 16, **given)])

    clean = torch.stack([exact(domain, k)[:2, seen] for k in range(len(TIMES))])
    truth = {name: NECROSIS[name] for name in names}
    found = fits(forward, clean, truth, {"growth": 0.4, "death": 0.2, "uptake": 1.5})
    note = (
        "error: the worst species, L2; data: proliferating and necrotic density from the radial form at "
        f"{len(seen)} vertices and {len(TIMES)} times, the nutrient unseen; voxels of the search 1.3 mm; "
        "the radial form has the reaction's formulae from `Necrosis`: this row tests the discretisation, the "
        "formulae themselves are tested in tests/solvers/test_science_species.py"
    )
    reference = "radial form by finite volumes and BDF"
    return Row("necrotic spheroid, 3-D", reference, errors[-1], 0.02, order, 2.0, found, note)


def rows(full: bool) -> list[Row]:
    """Go or grow, and the spheroid."""
    return [go_or_grow(), necrosis(full)]
