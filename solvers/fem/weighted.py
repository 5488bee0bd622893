r"""H1 of a domain with a weight in each cell, its exact solves and draws:

    (a, b) = pull sum_i M_i a_i b_i + int weight grad a . grad b,    G = pull M + K(weight).

With weight = 1 / |grad u| it is the metric of lagged diffusivity, in which the total variation near u is a
quadratic (Vogel and Oman 1996). As K = D^T diag(w) D with the differences D along pairs of vertices
(solvers.fem.operators),

    G^-1 (sqrt(pull M) xi + D^T sqrt(w) eta),    xi, eta white noise,

is a draw of N(0, G^-1), exact where no w is negative (voxel bricks, meshes without obtuse angles).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain
from solvers.fem.operators import DiffusionOperator
from solvers.fem.spaces import communicator
from solvers.fem.spd import Inverse
from solvers.spaces import GramSpace


class WeightedSobolev:
    """`space` with that Gram matrix, draws of N(0, G^-1), and the |grad u|^2 that weights are made of.

    pull > 0; weight: positive, (cells,), 1 by default. G is factorised on planes, lines and small solids;
    elsewhere it is solved by conjugate gradients with algebraic multigrid to `rtol`.
    """

    def __init__(
        self,
        domain: Domain,
        pull: float,
        weight: Tensor | None = None,
        rtol: float = 1e-8,
        operator: DiffusionOperator | None = None,
    ) -> None:
        if not (math.isfinite(pull) and pull > 0):
            raise GliodeError(f"WeightedSobolev: pull must be positive and finite, got {pull}")
        weight = torch.ones(domain.n_cells, dtype=torch.float64) if weight is None else weight.detach()
        if not bool((torch.isfinite(weight) & (weight > 0)).all()):
            raise GliodeError("WeightedSobolev: the weight must be positive and finite in every cell")
        self.domain, self.pull, self._rtol = domain, pull, rtol
        self._operator = operator or DiffusionOperator(domain)
        self._w = self._operator.conductances(weight)
        self._inverse: Inverse | None = None
        self.space = GramSpace(domain.n_owned, self._apply, self._solve, communicator(domain))

    def weighted(self, weight: Tensor) -> WeightedSobolev:
        """The same with another weight."""
        return WeightedSobolev(self.domain, self.pull, weight, self._rtol, self._operator)

    def energy(self, u: Tensor) -> Tensor:
        """The mean of |grad u|^2 over each cell, (cells,), by the quadrature of K."""
        D = torch.ones(self.domain.n_cells, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            whole = torch.dot(self._operator.conductances(D), self._operator.differences(u.detach()).square())
            (integral,) = torch.autograd.grad(whole, D)
        return integral.clamp(min=0) / self.domain.cell_volumes

    def sample(self, generator: torch.Generator) -> Tensor:
        """A draw of N(0, G^-1), (owned dofs,). Under MPI seed the generators of all ranks alike."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        local = torch.Generator().manual_seed(seed + self.domain.comm.rank)
        flux = torch.randn(len(self._w), dtype=torch.float64, generator=local) * self._w.clamp(min=0).sqrt()
        white = torch.randn(self.domain.n_owned, dtype=torch.float64, generator=local)
        ends = torch.zeros(len(self.domain.points), dtype=torch.float64)
        pairs = self._operator.conductances
        ends.index_add_(0, pairs.first, flux).index_add_(0, pairs.second, -flux)
        return self._solve((self.pull * self.domain.mass).sqrt() * white + self.domain.ghosts.gather(ends))

    def _apply(self, a: Tensor) -> Tensor:
        return self.pull * self.domain.mass * a + self._operator.stiffness(self._w, a)

    def _solve(self, dual: Tensor) -> Tensor:
        if self._inverse is None:
            self._inverse = Inverse(
                self.domain,
                self._operator.matrix(self._w, 1 / self.pull).copy(),
                self._rtol,
                "WeightedSobolev: the solve did not converge",
                "check that the weight's largest and smallest values are not too far apart",
            )
        return torch.from_numpy(self._inverse((dual / self.pull).numpy()))
