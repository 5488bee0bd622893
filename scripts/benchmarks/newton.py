r"""Newton-CG on hippylib's two Poisson coefficient examples: Newton and CG iterations on three meshes.

-div(exp(m) grad u) = f on the unit square, 64 x 64 x 2 triangles, u in P2, m in P1. hippylib's tutorials
(version 3.0.0) print 8 Newton and 43 CG iterations for `coefficient`, 12 and 89 for `subsurface`:

    coefficient  f = 1, u = 0 on the boundary; data: u everywhere, with noise of 5 % of its largest value at
                 each node; J = 1/2 int (u - u_d)^2 + 1e-8/2 int |grad m|^2; truth: log 2 in a disc, log 9
                 outside; start: log 2; metric 1e-8 (K + M); until ||J'|| in L2 is 1e-8.
    subsurface   f = 0, u = 0 at the bottom and 1 on top; data: 50 values in [0.1, 0.9] x [0.1, 0.5], 1 %
                 noise; the BiLaplacian prior (gamma 0.1, delta 0.5, Theta of 2 and 0.5 at 45 degrees, Robin);
                 truth: a draw of it, on which the counts depend; start: 0; until ||J'|| in L2 has fallen to
                 1e-6 of its first value.

Both: Gauss-Newton for 5 iterations, then Newton; Armijo; Eisenstat-Walker from 0.5. On the coarser meshes the
data are the same. hippylib's count of `coefficient` includes a last step (15 CG) from a point that already
met its tolerance; here the tolerance is checked before a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dolfinx
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
import ufl
from dolfinx.fem import Function
from mpi4py import MPI
from torch import Tensor

from inverse.optimizers import newton_cg
from inverse.problem import LeastSquares
from inverse.regularizers.gaussian import GaussianPrior
from inverse.regularizers.sobolev import Seminorm
from inverse.stopping import MaxIterations, State
from scripts.benchmarks import Check
from solvers.errors import GliodeError
from solvers.fem import priors
from solvers.fem.compat import geometry_dofmap
from solvers.fem.implicit import ImplicitStep
from solvers.fem.mesh import Domain, from_mesh
from solvers.spaces import GramSpace

FINEST = 64
DRAWS = 10
PUBLISHED = {"coefficient": (8, 43), "subsurface": (12, 89)}


class Linear(torch.autograd.Function):
    """x -> B x for a sparse matrix B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: scipy.sparse.csr_matrix) -> Tensor:
        ctx.B = B
        return torch.from_numpy(B @ x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Linear.apply(grads[0], ctx.B.T), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return Linear.apply(tangents[0], ctx.B)


class Poisson:
    """m (P1) -> u (P2) on n x n x 2 triangles, by one factorisation a point m."""

    def __init__(
        self, n: int, source: float, walls: Callable[[Any], Any], value: Callable[[Any], Any]
    ) -> None:
        mesh = dolfinx.mesh.create_unit_square(MPI.COMM_SELF, n, n)
        self.domain: Domain = from_mesh(mesh)
        self.V = dolfinx.fem.functionspace(mesh, ("Lagrange", 2))
        u, zero, m = Function(self.V), Function(self.V), Function(self.domain.V)
        m.name = "m"
        v = ufl.TestFunction(self.V)
        edge = Function(self.V)
        edge.interpolate(value)
        bc = dolfinx.fem.dirichletbc(edge, dolfinx.fem.locate_dofs_geometrical(self.V, walls))
        F = (ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) - source * v) * ufl.dx
        self._step = ImplicitStep(F, u, zero, [m], bcs=[bc])
        self.fixed = bc.dof_indices()[0]
        self._zero = torch.zeros(len(zero.x.array), dtype=torch.float64)
        a, b = ufl.TrialFunction(self.domain.V), ufl.TestFunction(self.domain.V)
        self.mass, self.stiffness = (
            dolfinx.fem.assemble_matrix(dolfinx.fem.form(form)).to_scipy().tocsc()
            for form in (a * b * ufl.dx, ufl.inner(ufl.grad(a), ufl.grad(b)) * ufl.dx)
        )

    def __call__(self, m: Tensor) -> Tensor:
        return self._step(self._zero, m)

    def interpolate(self, f: Callable[[Any], Any]) -> Tensor:
        return self.domain.interpolate(f)

    def evaluation(self, points: Any) -> scipy.sparse.csr_matrix:
        """B with (B u)_k = u(x_k), points (k, 2)."""
        mesh = self.domain.mesh
        at = np.column_stack([points, np.zeros(len(points))])
        tree = dolfinx.geometry.bb_tree(mesh, 2, padding=1e-9)
        colliding = dolfinx.geometry.compute_colliding_cells(
            mesh, dolfinx.geometry.compute_collisions_points(tree, at), at
        )
        cells = colliding.array[colliding.offsets[:-1]]
        corners = mesh.geometry.x[geometry_dofmap(mesh)[cells]][:, :, :2]
        J = np.stack([corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]], axis=2)
        reference = np.linalg.solve(J, (points - corners[:, 0])[:, :, None])[:, :, 0]
        values = self.V.element.basix_element.tabulate(0, reference)[0, :, :, 0]
        dofs = self.V.dofmap.list[cells]
        rows = np.repeat(np.arange(len(points)), dofs.shape[1])
        shape = (len(points), len(self._zero))
        return scipy.sparse.csr_matrix((values.ravel(), (rows, dofs.ravel())), shape)

    def quadrature(self) -> tuple[Any, Any]:
        """Points (k, 2) and weights (k,) of a rule that integrates u^2 exactly."""
        import basix

        X, w = basix.make_quadrature(basix.CellType.triangle, 4)
        mesh = self.domain.mesh
        corners = mesh.geometry.x[geometry_dofmap(mesh)][:, :, :2]
        J = np.stack([corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]], axis=2)
        points = corners[:, None, 0] + np.einsum("cij,qj->cqi", J, X)
        return points.reshape(-1, 2), (np.abs(np.linalg.det(J))[:, None] * w).ravel()


@dataclass(frozen=True)
class L2Gradient:
    """Stop at ||J'|| <= max(absolute, relative ||J'(m_0)||) in the norm of L2, as published."""

    problem: LeastSquares
    mass: Any
    absolute: float = 0.0
    relative: float = 0.0

    def __call__(self, state: State) -> dict[str, float] | None:
        norm = self.norm(state.m)
        if state.iteration == 0:
            object.__setattr__(self, "absolute", max(self.absolute, self.relative * norm))
        return {"gradient_norm": norm} if norm <= self.absolute else None

    def norm(self, m: Tensor) -> float:
        dual = self.problem.value_and_gradient(m)[1].numpy()
        return float(np.sqrt(dual @ self.mass.solve(dual)))


def coefficient(poisson: Poisson, data: tuple[Any, Any, Tensor]) -> tuple[LeastSquares, Tensor, L2Gradient]:
    points, weights, values = data
    gamma = 1e-8
    gram = gamma * (poisson.stiffness + poisson.mass)
    factor = scipy.sparse.linalg.splu(gram)
    space = GramSpace(
        gram.shape[0],
        lambda a: torch.from_numpy(gram @ a.numpy()),
        lambda d: torch.from_numpy(factor.solve(d.numpy())),
    )
    B = poisson.evaluation(points)
    penalty = Seminorm(lambda a: torch.from_numpy(poisson.stiffness @ a.numpy()), gamma)
    sd = torch.from_numpy(weights**-0.5)
    problem = LeastSquares(space, lambda m: Linear.apply(poisson(m), B), values, sd, penalty)
    start = torch.full(space.shape, float(np.log(2)), dtype=torch.float64)
    return problem, start, L2Gradient(problem, scipy.sparse.linalg.splu(poisson.mass), absolute=1e-8)


def coefficient_data(poisson: Poisson, seed: int) -> tuple[Any, Any, Tensor]:
    """The noisy state of the finest mesh at quadrature points, which carry the L2 norm."""
    truth = poisson.interpolate(lambda x: np.log(2 + 7 * (np.hypot(x[:, 0] - 0.5, x[:, 1] - 0.5) > 0.2)))
    with torch.no_grad():
        u = poisson(truth).numpy()
    noise = 0.05 * np.abs(u).max() * np.random.default_rng(seed).standard_normal(len(u))
    noise[poisson.fixed] = 0.0
    points, weights = poisson.quadrature()
    return points, weights, torch.from_numpy(poisson.evaluation(points) @ (u + noise))


THETA = torch.tensor([[1.25, 0.75], [0.75, 1.25]], dtype=torch.float64)


def subsurface(poisson: Poisson, data: tuple[Any, Tensor, float]) -> tuple[LeastSquares, Tensor, L2Gradient]:
    points, values, noise = data
    field = priors.bilaplacian(poisson.domain, 0.1, 0.5, THETA, robin=True)
    prior = GaussianPrior(field.space, 0.0, field.sample)
    B = poisson.evaluation(points)
    problem = LeastSquares(prior.space, lambda m: Linear.apply(poisson(m), B), values, noise, prior)
    mass = scipy.sparse.linalg.splu(poisson.mass)
    return problem, prior.mean, L2Gradient(problem, mass, relative=1e-6)


def subsurface_data(poisson: Poisson, seed: int) -> tuple[Any, Tensor, float]:
    """50 noisy values of the state of the finest mesh; truth, places and noise are drawn."""
    field = priors.bilaplacian(poisson.domain, 0.1, 0.5, THETA, robin=True)
    truth = field.sample(torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.uniform(0.1, 0.9, 50), rng.uniform(0.1, 0.5, 50)])
    with torch.no_grad():
        clean = poisson.evaluation(points) @ poisson(truth).numpy()
    noise = 0.01 * float(np.abs(clean).max())
    return points, torch.from_numpy(clean + noise * rng.standard_normal(50)), noise


def boundary(x: Any) -> Any:
    return np.isclose(x[0] * (1 - x[0]) * x[1] * (1 - x[1]), 0.0)


def bottom_and_top(x: Any) -> Any:
    return np.isclose(x[1] * (1 - x[1]), 0.0)


SETTINGS: dict[str, tuple[Any, Any, tuple[float, Any, Any]]] = {
    "coefficient": (coefficient_data, coefficient, (1.0, boundary, lambda x: 0 * x[0])),
    "subsurface": (subsurface_data, subsurface, (0.0, bottom_and_top, lambda x: x[1])),
}


def counts(built: tuple[LeastSquares, Tensor, L2Gradient], globalisation: str = "armijo") -> tuple[int, int]:
    """Newton and CG iterations to the published tolerance."""
    problem, start, rule = built
    found = newton_cg.minimise(
        problem, start, "full", globalisation, gauss_newton_first=5, stopping=(rule, MaxIterations(40))
    )
    if found.stopped_by != "L2Gradient":
        raise GliodeError(f"newton: stopped by {found.stopped_by} {found.numbers}, not by its tolerance")
    return found.iterations, int(found.state.memory["inner_iterations"])


def run(full: bool) -> list[Check]:
    """The counts and their bars; of `subsurface` only that they do not depend on the mesh."""
    torch.set_num_threads(1)
    checks = []
    for name, (draw, build, equation) in SETTINGS.items():
        begin = time.perf_counter()
        meshes = {n: Poisson(n, *equation) for n in (FINEST // 4, FINEST // 2, FINEST)}
        found: dict[int, list[tuple[int, int]]] = {n: [] for n in meshes}
        for seed in range(DRAWS):
            data = draw(meshes[FINEST], seed)
            for n, poisson in meshes.items():
                found[n].append(counts(build(poisson, data)))
        for k, what in enumerate(("Newton", "CG")):
            median = {n: statistics.median(row[k] for row in rows) for n, rows in found.items()}
            published = PUBLISHED[name][k]
            title = f"{name}: {what} iterations, median of {DRAWS} draws"
            if name == "coefficient":
                checks.append(Check.at_most(title, median[FINEST], published))
            else:
                checks.append(Check(f"{title} (hippylib's one draw: {published})", median[FINEST]))
            spread = 100 * (max(median.values()) / min(median.values()) - 1)
            sizes = ", ".join(f"{n}: {value:g}" for n, value in median.items())
            checks.append(Check.at_most(f"{name}: {what} by mesh ({sizes}), spread", spread, 20, "%"))
        trusted = counts(build(meshes[FINEST], draw(meshes[FINEST], 0)), "trust_region")
        title = f"{name}: Newton, CG by the trust region, first draw"
        checks.append(Check(title, f"{trusted[0]}, {trusted[1]}"))
        checks.append(Check(f"{name}: time", time.perf_counter() - begin, "s"))
    return checks
