r"""Exact solutions of conservation laws: what their numerical forms are checked against.

Each takes x and t as arrays and has a jump at x = 0 at t = 0 unless said otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from solvers.errors import GliodeError

Array = NDArray[np.float64]
State = tuple[float, float, float]

SOD: tuple[State, State] = ((1.0, 0.0, 1.0), (0.125, 0.0, 0.1))
"""Density, velocity, pressure on both sides (Sod 1978)."""


def burgers(x: Any, t: float, left: float, right: float, speed: float = 1.0) -> Array:
    """The entropy solution of u_t + (a u^2/2)_x = 0: a shock for left > right (a > 0), else a rarefaction."""
    x = np.asarray(x, dtype=np.float64)
    slow, fast = speed * left, speed * right
    if slow > fast:
        return np.where(x < (slow + fast) / 2 * t, left, right)
    return np.asarray(np.clip(x / max(t, 1e-300) / speed, min(left, right), max(left, right)))


def burgers_wave(
    x: Any, t: float, mean: float, amplitude: float, phase: float = 0.0, speed: float = 1.0
) -> Array:
    """u(x, t) of u(x, 0) = mean + amplitude sin(2 pi x + phase), while smooth: t < 1/(2 pi a amplitude).

    u = u0(x - a u t), solved by Newton's method. Raises GliodeError after the shock has formed.
    """
    x = np.asarray(x, dtype=np.float64)
    if not 2 * np.pi * abs(speed * amplitude) * t < 1:
        raise GliodeError(f"burgers_wave: t = {t:g} is after the shock has formed; take an earlier time")
    foot = x - speed * mean * t
    for _ in range(100):
        wave = 2 * np.pi * foot + phase
        gap = foot + speed * t * (mean + amplitude * np.sin(wave)) - x
        foot = foot - gap / (1 + 2 * np.pi * speed * t * amplitude * np.cos(wave))
        if np.abs(gap).max() < 1e-14:
            break
    return np.asarray(mean + amplitude * np.sin(2 * np.pi * foot + phase))


def euler(
    x: Any, t: float, left: State = SOD[0], right: State = SOD[1], gamma: float = 1.4
) -> tuple[Array, Array, Array]:
    """Density, velocity and pressure of the Riemann problem of an ideal gas (Toro 2009, chapter 4).

    left, right: density, velocity, pressure. Raises GliodeError where a vacuum forms.
    """
    sound = [float(np.sqrt(gamma * p / rho)) for rho, _, p in (left, right)]
    if 2 * sum(sound) / (gamma - 1) <= right[1] - left[1]:
        raise GliodeError("euler: these states part so fast that a vacuum forms between them")

    def change(p: float, side: State, c: float) -> float:
        rho, _, known = side
        if p > known:
            a, b = 2 / ((gamma + 1) * rho), (gamma - 1) / (gamma + 1) * known
            return float((p - known) * np.sqrt(a / (p + b)))
        return float(2 * c / (gamma - 1) * ((p / known) ** ((gamma - 1) / (2 * gamma)) - 1))

    def total(p: float) -> float:
        return change(p, left, sound[0]) + change(p, right, sound[1]) + right[1] - left[1]

    high = max(left[2], right[2])
    while total(high) < 0:
        high *= 2
    p = float(brentq(total, 1e-14 * high, high, xtol=1e-15, rtol=1e-14))
    u = (left[1] + right[1] + change(p, right, sound[1]) - change(p, left, sound[0])) / 2
    speed: Array = np.asarray(np.asarray(x) / max(t, 1e-300), dtype=np.float64)
    side = _side(speed, left, sound[0], p, u, gamma)
    flipped = (right[0], -right[1], right[2])
    other = _side(-speed, flipped, sound[1], p, -u, gamma)
    return (
        np.where(speed < u, side[0], other[0]),
        np.where(speed < u, side[1], -other[1]),
        np.where(speed < u, side[2], other[2]),
    )


def _side(s: Array, known: State, c: float, p: float, u: float, gamma: float) -> tuple[Array, Array, Array]:
    """The waves left of the contact at x/t = s."""
    rho, v, p0 = known
    if p > p0:
        ratio, g = p / p0, (gamma - 1) / (gamma + 1)
        behind = rho * (ratio + g) / (g * ratio + 1)
        ahead = s < v - c * np.sqrt((gamma + 1) / (2 * gamma) * ratio + (gamma - 1) / (2 * gamma))
        return np.where(ahead, rho, behind), np.where(ahead, v, u), np.where(ahead, p0, p)
    behind = rho * (p / p0) ** (1 / gamma)
    head, tail = v - c, u - np.sqrt(gamma * p / behind)
    within = np.clip(s, head, tail)
    fan = 2 / (gamma + 1) * (c + (gamma - 1) / 2 * v + within)
    local = np.maximum(fan - within, 0.0)
    return rho * (local / c) ** (2 / (gamma - 1)), fan, p0 * (local / c) ** (2 * gamma / (gamma - 1))


def dam_break(x: Any, t: float, left: float, right: float, gravity: float = 9.81) -> tuple[Array, Array]:
    """Depth and velocity after a dam between depths left > right > 0 (water at rest) breaks (Stoker 1957)."""
    if not left > right > 0:
        raise GliodeError(f"dam_break: depths {left}, {right}; give left > right > 0")
    c = float(np.sqrt(gravity * left))

    def gap(h: float) -> float:
        wave = 2 * (c - np.sqrt(gravity * h))
        bore = (h - right) * np.sqrt(gravity / 2 * (h + right) / (h * right))
        return float(wave - bore)

    h = float(brentq(gap, right, left, xtol=1e-15, rtol=1e-14))
    u = 2 * (c - np.sqrt(gravity * h))
    s = np.asarray(x, dtype=np.float64) / max(t, 1e-300)
    within = np.clip(s, -c, u - np.sqrt(gravity * h))
    depth, velocity = (2 * c - within) ** 2 / (9 * gravity), 2 / 3 * (c + within)
    ahead = s > h * u / (h - right)
    return np.where(ahead, right, depth), np.where(ahead, 0.0, velocity)


def vortex(
    x: Any,
    y: Any,
    t: float,
    size: float = 10.0,
    mean: tuple[float, float] = (1.0, 1.0),
    strength: float = 5.0,
    gamma: float = 1.4,
) -> tuple[Array, Array, Array, Array]:
    """Density, velocities and pressure of an isentropic vortex carried along in a periodic square of side
    `size` about the origin, where it starts (Shu 1998).
    """
    dx = (np.asarray(x) - mean[0] * t + size / 2) % size - size / 2
    dy = (np.asarray(y) - mean[1] * t + size / 2) % size - size / 2
    swirl = strength / (2 * np.pi) * np.exp((1 - dx**2 - dy**2) / 2)
    temperature = 1 - (gamma - 1) / (2 * gamma) * swirl**2
    rho = temperature ** (1 / (gamma - 1))
    return rho, mean[0] - dy * swirl, mean[1] + dx * swirl, rho * temperature
