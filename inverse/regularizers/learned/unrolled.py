r"""Unrolled methods: a number of steps of a method, trained end to end, from data to images.

    LearnedDescent        x_(k+1) = x_k - tau_k (A^T(A x_k - y) / ||A||^2 + mu_k R_k'(x_k)),    k < steps
    ContinuousUnrolling   x' = -K(t)^T sigma(K(t) x + b(t)) - lambda A^T(A x - y),    0 <= t <= T

from the naive reconstruction x_0 = x(0) = B y, linear in y (the first: Hammernik et al. 2018; the second:
Celledoni et al. 2021 and docs/theory/regularisation_flow.md). All that is not A or B is trained: R_k, tau_k,
mu_k; K(t), b(t), lambda and the time T at which to stop.

Neither minimises anything. Each is made for one map and one noise, and away from them it may be worth less
than a method that is told of them (docs/theory/unrolled.md has numbers). Of ContinuousUnrolling one thing is
certain: its steps are kept so short that they do not expand, so that data y + e are answered by images

    no further than (||B|| + lambda ||A|| T) ||e|| from those of y, whatever the weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from inverse.image_problems import ImageProblem, image_problem
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy
from solvers.errors import GliodeError
from solvers.node.convolution_flow import ConvolutionalFlow
from solvers.ode.fields import Sampled, VectorField
from solvers.ode.integrate import integrate


class Unrolled(nn.Module):
    """Data (batch, ...) -> images (batch, pixels, pixels) of an image problem, of its name and size."""

    def __init__(self, problem: str, pixels: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = {"problem": problem, "pixels": pixels, **settings}
        self.problem = image_problem(problem, pixels)

    def on(self, problem: ImageProblem) -> Self:
        """The same for another map, size or naive reconstruction from now on."""
        self.problem = problem
        return self

    def settings(self) -> dict[str, Any]:
        """The arguments that make a method of this architecture; on the problem that it was made for."""
        return dict(self._settings)

    def forward(self, y: Tensor) -> Tensor:
        form = self.problem.A.data_shape
        if y.shape[1:] != form:
            raise GliodeError(
                f"unrolled: data of shape {tuple(y.shape)}; those of its problem are of ({len(y)}, "
                f"{', '.join(map(str, form))}): give such, or call `on` with theirs"
            )
        return self.reconstructed(y, self.problem.naive(y))

    @abstractmethod
    def reconstructed(self, y: Tensor, x: Tensor) -> Tensor:
        """From the data and the naive images, on the tape."""

    def misfit_slope(self, x: Tensor, y: Tensor) -> Tensor:
        """A^T(A x - y) / ||A||^2."""
        A = self.problem.A
        return A.adjoint(A(x) - y) / self.problem.norm**2


class LearnedDescent(Unrolled):
    """Unrolled gradient descent with energies of an architecture of inverse.regularizers.learned.files.

    energy: its name, with `options`; steps: as many energies, each with weights of its own. scale: R_k of
    scale x, so that energies made for other values fit. The first tau_k are 1, and the mu_k are 0.1.
    """

    def __init__(
        self,
        problem: str,
        pixels: int = 96,
        energy: str = "ridge",
        options: Mapping[str, Any] | None = None,
        steps: int = 8,
        scale: float = 1.0,
    ) -> None:
        options = dict(options or {})
        settings = {"energy": energy, "options": options, "steps": steps, "scale": scale}
        super().__init__(problem, pixels, settings)
        if steps < 1 or not (math.isfinite(scale) and scale > 0):
            raise GliodeError(f"learned descent: {steps} steps, scale {scale}; give 1 or more, positive")
        made = [files.build(energy, options) for _ in range(steps)]
        if not all(isinstance(one, Energy) for one in made):
            raise GliodeError(f"learned descent: {energy} is no energy R(x)")
        self.energies, self.scale = nn.ModuleList(made), scale
        self.log_tau = nn.Parameter(torch.zeros(steps))
        self.log_mu = nn.Parameter(torch.full((steps,), math.log(0.1)))

    def reconstructed(self, y: Tensor, x: Tensor) -> Tensor:
        taus, mus = self.log_tau.exp(), self.log_mu.exp()
        for energy, tau, mu in zip(self.energies, taus, mus, strict=True):
            assert isinstance(energy, Energy)
            x = x - tau * (self.misfit_slope(x, y) + mu / self.scale * energy.gradient(self.scale * x))
        return x


class ContinuousUnrolling(Unrolled):
    """The flow above in `steps` Euler steps, with T and lambda trained and ||K(t)|| <= 1.

    channels, size, sigma, knots, width: of the `ConvolutionalFlow`, K and b linear between knots. time,
    pull: T and lambda ||A||^2 at the start; T is kept at most 2 steps / (1 + lambda ||A||^2), where the steps
    begin to expand. Time is counted in parts of T, so that weights follow it as it is trained.
    """

    def __init__(
        self,
        problem: str,
        pixels: int = 96,
        channels: int = 8,
        size: int = 7,
        sigma: str = "tanh",
        knots: int = 4,
        steps: int = 8,
        time: float = 4.0,
        pull: float = 1.0,
        width: float = 0.03,
    ) -> None:
        own = {"channels": channels, "size": size, "sigma": sigma, "knots": knots, "steps": steps}
        super().__init__(problem, pixels, {**own, "time": time, "pull": pull, "width": width})
        if steps < 1 or not all(math.isfinite(v) and v > 0 for v in (time, pull)):
            raise GliodeError(
                f"continuous unrolling: {steps} steps, time {time}, pull {pull}; give 1 or more, positive"
            )
        self.flow = ConvolutionalFlow(channels, size, sigma, "linear", knots, 1.0, 1.0, width)
        if self.flow.sigma.slopes[1] > 1:
            raise GliodeError(f"continuous unrolling: activation {sigma} has slopes above 1")
        self.steps = steps
        self.log_time = nn.Parameter(torch.tensor(math.log(time)))
        self.log_pull = nn.Parameter(torch.tensor(math.log(pull)))

    def constants(self) -> tuple[Tensor, Tensor]:
        """T and lambda ||A||^2, on the tape."""
        pull = self.log_pull.exp()
        return torch.minimum(self.log_time.exp(), 2 * self.steps / (1 + pull)), pull

    def amplification(self) -> float:
        """lambda ||A|| T: how far a unit of noise in the data moves the images, beyond ||B||."""
        time, pull = self.constants()
        return float(time * pull) / self.problem.norm

    def reconstructed(self, y: Tensor, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        return integrate(_Fed(self, y), x, grid, "euler", "autograd")


class _Fed(VectorField):
    """T (flow - lambda A^T(A x - y)) on [0, 1]."""

    saves_value = False

    def __init__(self, of: ContinuousUnrolling, y: Tensor) -> None:
        super().__init__()
        self.of, self.y = of, y

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        mine = (*self.of.constants(), self.y)
        return *self.of.flow.sample(stages), *(Sampled.constant(w, stages) for w in mine)

    def check(self, x0: Tensor, times: Tensor, scheme: Any) -> None:
        self.of.flow.check(x0, times, scheme)

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        *flow, time, pull, y = w
        return time * (self.of.flow.rhs(x, *flow) - pull * self.of.misfit_slope(x, y))
