r"""Kinetic equations with discrete velocities v_k of weights w_k, in steps that are asymptotic-preserving.

    linear transport    f_t + (v/eps) f_x = (sigma/eps^2) (<f> - f),    <f> = sum_k w_k f_k, sum_k w_k = 1
    BGK                 f_t + v f_x = (M[f] - f)/tau,                   M[f] the Maxwellian of f's moments

`MicroMacro` steps the first at a dt that does not depend on eps, towards rho_t = (<v^2> rho_x/sigma)_x as eps
falls; two velocities +-1 are the Goldstein-Taylor model (a telegraph equation for rho), more are discrete
ordinates of a slab. `BGK` steps the second at a dt that does not depend on tau, towards Euler's equations.
States are batch first.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from solvers.errors import Diverged, GliodeError
from solvers.evolution import PointwiseStep, Strang
from solvers.node.science.laws import require_courant
from solvers.ode.integrate import integrate

Array = NDArray[np.float64]
Velocities = tuple[Array, Array]

GOLDSTEIN_TAYLOR: Velocities = (np.array([-1.0, 1.0]), np.array([0.5, 0.5]))
"""Velocities and weights of the two-velocity model (Goldstein 1951, Taylor 1922)."""


def ordinates(count: int) -> Velocities:
    """Gauss-Legendre directions cosines on [-1, 1], weights of sum 1: S_N in a slab (Chandrasekhar 1960)."""
    if count < 2 or count % 2:
        raise GliodeError(f"ordinates: {count}; give an even number, 2 or more")
    v, w = np.polynomial.legendre.leggauss(count)
    return v, w / 2


def check_velocities(velocities: Velocities) -> None:
    """Raise GliodeError unless the weights are positive with sum 1 and the mean velocity is 0."""
    v, w = (np.asarray(a, dtype=np.float64) for a in velocities)
    if v.ndim != 1 or v.shape != w.shape or not (w > 0).all() or not np.isfinite(v).all():
        raise GliodeError("velocities: give (v, w), as many positive weights as finite velocities")
    if abs(w.sum() - 1) > 1e-12 or abs(w @ v) > 1e-12:
        raise GliodeError(f"velocities: the weights sum to {w.sum():g} (need 1), w . v is {w @ v:g} (need 0)")


def fourier_mode(
    velocities: Velocities, eps: float, sigma: float, wave: float, t: float, start: Array
) -> NDArray[np.complex128]:
    """f(t) of f(x, t) = f(t) exp(i wave x) for constant sigma: a matrix exponential of the velocities."""
    v, w = velocities
    A = -1j * wave / eps * np.diag(v) + sigma / eps**2 * (np.outer(np.ones_like(v), w) - np.eye(len(v)))
    return np.asarray(scipy.linalg.expm(t * A) @ start)


class MicroMacro:
    r"""step(u, dt, sigma) for f = rho + eps g, <g> = 0, on a periodic interval of n cells.

        (g1 - g0)/dt + (I - <.>) v g0_x/eps = -(sigma g1 + v rho0_x)/eps^2,    rho1 = rho0 - dt <v g1>_x

    (Lemou and Mieussens 2008, here with central differences): rho at the cells' centres, g at the faces to
    their right; second order in space, first in dt, uniformly in eps. u: (..., n, 1 + velocities), rho first.
    sigma > 0: a number, (n,) at the faces, or (batch, 1) or (batch, n). The mass is kept to rounding.
    Raises GliodeError beyond the largest stable step, which is sigma h^2 / (2 <v^2>) or more for every eps
    (and about eps h where that is longer, for two velocities).
    """

    def __init__(self, velocities: Velocities, length: float, cells: int, eps: float) -> None:
        check_velocities(velocities)
        if cells < 5 or not (length > 0 and eps > 0):
            raise GliodeError(
                f"micro-macro: {cells} cells of a length {length:g}, eps {eps:g}; give 5 or more, positive"
            )
        self.v, self.w = (np.asarray(a, dtype=np.float64) for a in velocities)
        self.h, self.cells, self.eps = length / cells, cells, eps
        self.centres = torch.from_numpy(self.h * (np.arange(cells) + 0.5))
        self.faces = self.centres + self.h / 2
        self._tensors: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._checked = (math.nan, math.nan)

    def start(self, rho: Tensor, g: Tensor | None = None) -> Tensor:
        """The state of a density (..., n) at the centres and g (..., n, velocities) at the faces (or 0)."""
        shape = (*rho.shape, len(self.v))
        g = rho.new_zeros(shape) if g is None else g
        return torch.cat([rho[..., None], g], -1)

    def density(self, u: Tensor) -> Tensor:
        """rho, (..., n), at the centres."""
        return u[..., 0]

    def __call__(self, u: Tensor, dt: Tensor | float, sigma: Tensor | float = 1.0) -> Tensor:
        """u after dt."""
        if tuple(u.shape[-2:]) != (self.cells, 1 + len(self.v)):
            raise GliodeError(f"state: {tuple(u.shape)}; it ends with {(self.cells, 1 + len(self.v))}")
        v, w = self._on(u)
        sigma = torch.as_tensor(sigma, dtype=u.dtype, device=u.device)
        self._check(float(dt), float(sigma.detach().min()))
        rho, g = u[..., 0], u[..., 1:]
        slope = (rho.roll(-1, -1) - rho)[..., None] / self.h
        moved = v * (g.roll(-1, -2) - g.roll(1, -2)) / (2 * self.h)
        moved = moved - (moved * w).sum(-1, keepdim=True)
        eps, wide = self.eps, sigma[..., None] if sigma.ndim else sigma
        g = (eps**2 * g - eps * dt * moved - dt * v * slope) / (eps**2 + dt * wide)
        current = (g * (v * w)).sum(-1)
        rho = rho - dt * (current - current.roll(1, -1)) / self.h
        return torch.cat([rho[..., None], g], -1)

    def _on(self, u: Tensor) -> tuple[Tensor, Tensor]:
        key = (u.device, u.dtype)
        if key not in self._tensors:
            self._tensors[key] = (torch.from_numpy(self.v).to(u), torch.from_numpy(self.w).to(u))
        return self._tensors[key]

    def _check(self, dt: float, sigma: float) -> None:
        if (dt, sigma) == self._checked:
            return
        if not 0 < sigma < math.inf:
            raise GliodeError(f"sigma: {sigma:g} somewhere; scattering must be positive and finite")
        require_courant(dt, math.inf)  # a time at all
        if not self._stable(dt, sigma):
            require_courant(dt, self.largest_step(sigma))
        self._checked = (dt, sigma)

    def largest_step(self, sigma: float) -> float:
        """The largest dt at which no Fourier mode grows, for the least sigma."""
        high = self.h**2 * sigma + self.eps * self.h
        low = 0.0
        while self._stable(high, sigma):
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._stable(middle, sigma) else (low, middle)
        return low

    def _stable(self, dt: float, sigma: float) -> bool:
        """Whether the amplification matrices' spectral radii are at most 1 (von Neumann)."""
        angle = np.linspace(0, np.pi, 65)[1:, None, None]
        v, w, eps, h = self.v, self.w, self.eps, self.h
        half = 2j * np.sin(angle / 2) / h
        moved = 1j * np.sin(angle) / h * (np.diag(v) - w * v)
        bottom = eps**2 * np.eye(len(v)) - eps * dt * moved
        g = np.concatenate([-dt * half * v[:, None], bottom], -1) / (eps**2 + sigma * dt)
        rho = -dt * half * ((v * w) @ g)[:, None, :]
        rho[..., 0] += 1
        radius = np.abs(np.linalg.eigvals(np.concatenate([rho, g], 1))).max()
        return bool(radius <= 1 + 1e-9)


class BGK:
    r"""step(u, dt, tau) of the BGK model in one dimension (Bhatnagar, Gross and Krook 1954).

    u: (..., n, 2 nv), a distribution g over nv velocities and then h, which carries the energy of the other
    K = 2/(gamma - 1) - 1 degrees of freedom (Chu 1965): gamma = 1.4 for K = 4.

        rho = sum w g,  rho u = sum w v g,  E = sum w (v^2 g + h)/2 = rho u^2/2 + (1 + K) rho T/2,  p = rho T

    Strang splitting: relaxation for dt/2 (exact, as the moments stand still: f -> M + (f - M) e^(-dt/2 tau)),
    transport for dt, relaxation for dt/2. Transport: finite volumes with van Leer's slopes and Heun's method.
    The Maxwellian is multiplied by a quadratic in v that makes its discrete moments exact: mass, momentum and
    energy are kept to rounding. Second order for tau > dt; as tau falls to 0 a kinetic scheme for Euler's
    equations (Pullin 1980). The ends are open. Raises GliodeError for dt beyond h/(2 max |v|), at any tau.
    """

    def __init__(
        self,
        low: float,
        high: float,
        cells: int,
        fastest: float = 7.0,
        count: int = 24,
        gamma: float = 1.4,
    ) -> None:
        if not (low < high and cells >= 3 and fastest > 0 and count >= 6 and 1 < gamma <= 3):
            raise GliodeError(
                f"BGK: [{low:g}, {high:g}] in {cells} cells, {count} velocities to {fastest:g}, "
                f"gamma {gamma:g}; "
                "give increasing ends, 3 cells, 6 velocities or more, 1 < gamma <= 3"
            )
        self.h, self.cells, self.fastest = (high - low) / cells, cells, fastest
        self.centres = torch.from_numpy(low + self.h * (np.arange(cells) + 0.5))
        self.v = torch.linspace(-fastest, fastest, count, dtype=torch.float64)
        self.weight = 2 * fastest / (count - 1)
        self.inner = 2 / (gamma - 1) - 1
        self._powers = torch.stack([self.v**j for j in range(5)], 1)
        relaxation = PointwiseStep(self._relaxed)
        self._step = Strang(self._transported, relaxation, n_diffusion=1)

    @property
    def largest_step(self) -> float:
        """h / (2 max |v|)."""
        return self.h / (2 * self.fastest)

    def __call__(self, u: Tensor, dt: Tensor | float, tau: Tensor | float = 1e-3) -> Tensor:
        """u after dt; tau: a number, or (n, 1), or (batch, 1, 1)."""
        if tuple(u.shape[-2:]) != (self.cells, 2 * len(self.v)):
            raise GliodeError(f"state: {tuple(u.shape)}; it ends with {(self.cells, 2 * len(self.v))}")
        tau = torch.as_tensor(tau, dtype=u.dtype, device=u.device)
        if not bool((tau.detach() > 0).all()):
            raise GliodeError(f"tau: {float(tau.detach().min()):g}; the relaxation time must be positive")
        require_courant(float(dt), self.largest_step)
        return self._step(u, dt, tau)

    def equilibrium(self, density: Tensor, velocity: Tensor, pressure: Tensor) -> Tensor:
        """The state, (..., n, 2 nv), of a gas at rest with itself; each (..., n)."""
        temperature = pressure / density
        return self._maxwellian(density, velocity, temperature)

    def macroscopic(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Density, velocity and pressure, (..., n) each."""
        rho, momentum, energy = self.moments(u).unbind(-1)
        velocity = momentum / rho
        return rho, velocity, (2 * energy - momentum * velocity) / (1 + self.inner)

    def moments(self, u: Tensor) -> Tensor:
        """Mass, momentum and energy, (..., n, 3)."""
        g, h = u.chunk(2, -1)
        first = g @ self._powers[:, :3].to(u)
        energy = (first[..., 2] + h.sum(-1)) / 2
        return self.weight * torch.stack([first[..., 0], first[..., 1], energy], -1)

    def _relaxed(self, u: Tensor, dt: Tensor, tau: Tensor) -> Tensor:
        rho, velocity, pressure = self.macroscopic(u)
        if not bool((pressure.detach() > 0).all() and (rho.detach() > 0).all()):
            raise Diverged("BGK: a density or pressure is not positive; use more velocities or cells")
        M = self._maxwellian(rho, velocity, pressure / rho)
        return M + (u - M) * torch.exp(-dt / tau)

    def _maxwellian(self, rho: Tensor, u: Tensor, T: Tensor) -> Tensor:
        """With exact discrete moments: g M (a + b v + c v^2) of a 3 x 3 system."""
        v = self.v.to(rho)
        g = (rho / (2 * math.pi * T).sqrt())[..., None] * torch.exp(
            -((v - u[..., None]) ** 2) / (2 * T[..., None])
        )
        sums = self.weight * (g @ self._powers.to(rho))
        hankel = torch.stack([sums[..., j : j + 3] for j in range(3)], -2)
        wanted = torch.stack([rho, rho * u, rho * (u * u + T)], -1)
        factor = torch.linalg.solve(hankel, wanted) @ self._powers[:, :3].to(rho).mT
        g = g * factor
        return torch.cat([g, self.inner * T[..., None] * g], -1)

    def _transported(self, u: Tensor, dt: Tensor | float) -> Tensor:
        end = torch.as_tensor(dt, dtype=u.dtype, device=u.device)
        times = torch.stack([torch.zeros_like(end), end])
        return integrate(lambda t, x: self._free(x), u, times, "heun", gradient="autograd")

    def _free(self, u: Tensor) -> Tensor:
        """-v f_x, van Leer's slopes (1974), open ends."""
        v = self.v.to(u).repeat(2)
        padded = torch.cat([u[..., :1, :], u, u[..., -1:, :]], -2)
        gap = padded.diff(dim=-2)
        left, right = gap[..., :-1, :], gap[..., 1:, :]
        same = left * right > 0
        slope = torch.where(same, 2 * left * right / torch.where(same, left + right, 1.0), 0.0)
        ahead, behind = u + slope / 2, u - slope / 2
        first, last = u[..., :1, :], u[..., -1:, :]
        flux = torch.where(v > 0, torch.cat([first, ahead], -2), torch.cat([behind, last], -2)) * v
        return -flux.diff(dim=-2) / self.h


def time_steps(duration: float, largest: float) -> int:
    """The number of equal steps that keeps each at or below the largest stable one."""
    if not (duration > 0 and largest > 0 and math.isfinite(duration / largest)):
        raise GliodeError(
            f"time_steps: a duration {duration:g} in steps of {largest:g}; give positive numbers"
        )
    return math.ceil(duration / largest * (1 - 1e-12))
