"""DOLFINx and torch forms of tumour growth agree: MNI152 at 4 mm, 200 days, states and gradients.

D 0.65 and 0.13 mm^2/day in white and grey matter, rho 0.012 /day (as in `brain`), 20 steps of 10 days,
J = 1/2 ||u(200)||^2. The reference is DOLFINx/PETSc on one process. The other forms: DOLFINx on two ranks, in
processes of their own, and torch alone from the file that `solvers.fem.export` wrote, in the same scheme:

    RKL2/Strang   sparse products; the compiled lanes and the matrix-free voxels of `Cohort`
    SDIRK2/Strang batched conjugate gradients beside PETSc's
    RKC           `integrate` with its tape-free adjoint: the saved right-hand side beside DOLFINx's

Gradients by D_white, D_grey, rho, the age, the seed at each vertex, and D in each cell (not of the lanes,
which know D by its tissues only); four different patients at once against each alone.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks import Check
from scripts.benchmarks._ranks import called
from scripts.benchmarks.brain import CENTRE, DAYS, GREY, RHO, WHITE
from solvers.evolution import Evolution, PointwiseStep, Strang
from solvers.fem.diffusion import DiffusionStep, Scheme
from solvers.fem.export import dof_numbers, export
from solvers.fem.mesh import Domain
from solvers.files import read_arrays, write_arrays
from solvers.node.science.batched import BatchedFlow
from solvers.node.science.cohort import Cohort
from solvers.node.science.implicit import ImplicitDiffusion, Resolvent
from solvers.node.science.linear import Linear
from solvers.node.science.sparse import PairOperator
from solvers.node.science.voxels import VoxelOperator
from solvers.ode.integrate import integrate
from solvers.ode.tableaux import chebyshev
from solvers.semidiscrete import SemiDiscrete, mixture, monomials
from solvers.spaces import reduce, replicate
from tumour.anatomy import mni152
from tumour.growth import logistic
from tumour.model import TumourModel, domain_of

SPACING, STEPS, RTOL, STAGES = 4.0, 20, 1e-12, 5
STATE_BAR, GRADIENT_BAR = 1e-6, 1e-5
NUMBERS = {"D_white": WHITE, "D_grey": GREY, "rho": RHO, "age": DAYS}
# Four patients: slower, faster, spreading more than growing, and the reverse.
PATIENTS = {
    "D_white": [WHITE, 0.3, 0.9, 0.2],
    "D_grey": [GREY, 0.06, 0.2, 0.04],
    "rho": [RHO, 0.010, 0.006, 0.025],
    "age": [DAYS, 260.0, 190.0, 150.0],
}
Array = np.ndarray[Any, np.dtype[Any]]
Outcome = dict[str, Array]  # the state, and the gradient by each name
Run = Callable[..., Tensor]  # (u0 (batch, n), D (batch, cells), rho (batch, 1), age (batch, 1)) -> u


def run(full: bool) -> list[Check]:
    """All checks."""
    torch.set_num_threads(1)
    domain = domain_of(mni152(SPACING))
    model = TumourModel(domain, rtol=RTOL)
    reference = {"rkl2": assembled(model, "rkl2"), "sdirk2": assembled(model, "sdirk2")}
    reference["rkc"] = assembled(model, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "brain.safetensors"
        export(domain, f"MNI152 at {SPACING:g} mm").save(path)
        problem, size = SemiDiscrete.load(path), path.stat().st_size
    u0 = seed(model)
    checks = [
        Check("vertices", problem.n),
        Check("the exported file", size / 1e6, "MB"),
        *compared("DOLFINx on 2 ranks, RKL2/Strang", on_ranks(2), reference["rkl2"]),
    ]
    for name, scheme, form in forms(problem):
        checks += compared(f"torch, {name}", found(problem, form, u0, NUMBERS), reference[scheme])
    limit = float(np.linalg.norm(reference["rkc"]["u"] - reference["rkl2"]["u"]))
    limit /= float(np.linalg.norm(reference["rkl2"]["u"]))
    checks.append(Check("for comparison: RKC from RKL2/Strang, the same steps", limit))
    for name, _, form in forms(problem):
        checks += one_by_one(name, problem, form, u0)
    return [*checks, Check("load average", os.getloadavg()[0], "processes")]


def compared(name: str, ours: Outcome, theirs: Outcome) -> list[Check]:
    """The differences of the states and, the worst of all names, of the gradients, relative."""
    distances = {
        key: float(np.linalg.norm(value - theirs[key]) / np.linalg.norm(theirs[key]))
        for key, value in ours.items()
    }
    state = distances.pop("u")
    worst = max(distances, key=lambda key: _size(distances[key]))
    return [
        Check.at_most(f"{name}: state", state, STATE_BAR),
        Check.at_most(
            f"{name}: {len(distances)} gradients, the worst by {worst}", distances[worst], GRADIENT_BAR
        ),
    ]


# ---- DOLFINx ----------------------------------------------------------------------------------------------


def seed(model: TumourModel) -> Tensor:
    """The seed in the exported numbering, (n,)."""
    u = model.seed_state(torch.tensor(CENTRE, dtype=torch.float64))
    return torch.from_numpy(_numbered(model.domain, dof_numbers(model.domain.V)[: len(u)], u))


def assembled(model: TumourModel, scheme: Scheme | None) -> Outcome:
    """The outcome by DOLFINx, on all ranks of the model's domain; scheme None: RKC of the whole equation."""
    domain, operator = model.domain, model.operator
    leaves = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in NUMBERS.items()}
    m = {name: replicate(leaf, domain.comm) for name, leaf in leaves.items()}
    u0 = model.seed_state(torch.tensor(CENTRE, dtype=torch.float64)).requires_grad_()
    D = model.diffusivity(m["D_white"], m["D_grey"])
    w = operator.conductances(D)
    if scheme is not None:
        step = Strang(PointwiseStep(logistic().flow), DiffusionStep(operator, scheme))
        u = Evolution(step)(u0, m["age"], STEPS, w, m["rho"])
    else:

        def field(t: Tensor, x: Tensor, w: Tensor, rho: Tensor, age: Tensor) -> Tensor:
            return age * (rho * x * (1.0 - x) - operator.stiffness(w, x) / domain.mass)

        times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        u = integrate(field, u0, times, chebyshev(STAGES), parameters=(w, m["rho"], m["age"]))
    J = reduce((0.5 * domain.mass * u**2).sum(), domain.comm)
    grads = torch.autograd.grad(J, [*leaves.values(), u0, D])
    *numbers, by_seed, by_cell = grads
    place = dof_numbers(domain.V)[: domain.n_owned]
    return {
        "u": _numbered(domain, place, u),
        **{name: grad.numpy() for name, grad in zip(leaves, numbers, strict=True)},
        "seed": _numbered(domain, place, by_seed),
        "D(x)": _numbered(domain, domain.cell_numbers, by_cell),
    }


def _numbered(domain: Domain, place: Array, values: Tensor) -> Array:
    """The values of all ranks at their places, on every rank."""
    parts = domain.comm.allgather((place, values.detach().numpy()))
    whole = np.empty(sum(len(where) for where, _ in parts))
    for where, part in parts:
        whole[where] = part
    return whole


def worker(path: str) -> None:
    """Leave the outcome of these ranks in a file."""
    torch.set_num_threads(1)
    outcome = assembled(TumourModel(domain_of(mni152(SPACING)), rtol=RTOL), "rkl2")
    if MPI.COMM_WORLD.rank == 0:
        write_arrays(path, "agreement", outcome)


def on_ranks(count: int) -> Outcome:
    """The outcome of `worker` on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.npz"
        code = f"from scripts.benchmarks.agreement import worker; worker({str(path)!r})"
        called(code, count)
        outcome = read_arrays(path, "agreement")
        assert outcome is not None
        return outcome


# ---- torch ------------------------------------------------------------------------------------------------


def forms(problem: SemiDiscrete) -> list[tuple[str, str, Run | Cohort]]:
    """Name, scheme, and how a batch of tumours evolves."""
    pairs, mass, grid = problem.conductances, problem.mass, problem.grid
    assert pairs is not None and isinstance(mass, Tensor) and grid is not None
    reaction, linear = PointwiseStep(logistic().flow), Linear(problem)
    implicit = Evolution(Strang(reaction, ImplicitDiffusion(Resolvent.of(problem, RTOL))))

    def by_products(operator: PairOperator | VoxelOperator) -> Run:
        flow = BatchedFlow(operator)

        def evolve(u0: Tensor, D: Tensor, rho: Tensor, age: Tensor) -> Tensor:
            w, box = operator.conductances(D), operator.box(u0)
            step = Strang(reaction, flow, len(w))
            numbers = (operator.numbers(x[:, 0]) for x in (age, rho))
            return operator.states(Evolution(step)(box, next(numbers), STEPS, *w, *numbers))

        return evolve

    def by_solves(u0: Tensor, D: Tensor, rho: Tensor, age: Tensor) -> Tensor:
        return implicit(u0, age, STEPS, pairs(D), rho)

    def by_stages(u0: Tensor, D: Tensor, rho: Tensor, age: Tensor) -> Tensor:
        def field(t: Tensor, x: Tensor, w: Tensor, rho: Tensor, age: Tensor) -> Tensor:
            return age * (rho * x * (1.0 - x) + linear(t, x, conductances=w))

        times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        return integrate(field, u0, times, chebyshev(STAGES), parameters=(pairs(D), rho, age))

    return [
        ("sparse products, RKL2/Strang", "rkl2", by_products(PairOperator(pairs, mass))),
        ("voxels, RKL2/Strang", "rkl2", by_products(VoxelOperator(grid))),
        ("lanes, RKL2/Strang", "rkl2", Cohort(problem, form="compiled")),
        ("conjugate gradients, SDIRK2/Strang", "sdirk2", by_solves),
        ("sparse products, RKC", "rkc", by_stages),
    ]


def found(problem: SemiDiscrete, form: Run | Cohort, u0: Tensor, patients: dict[str, Any]) -> Outcome:
    """The outcome of one tumour (numbers), or of some (lists), from u0 (n,)."""
    many = isinstance(patients["rho"], list)
    leaves = {
        name: torch.tensor(value, dtype=torch.float64).reshape(-1, 1).requires_grad_()
        for name, value in patients.items()
    }
    start = u0.expand(len(leaves["rho"]), -1).clone().requires_grad_()
    by = [*leaves.values(), start]
    tissues = torch.cat([leaves["D_white"], leaves["D_grey"]], 1)
    if isinstance(form, Cohort):
        u = form(start, leaves["D_white"], leaves["D_grey"], leaves["rho"], leaves["age"], steps=STEPS)
    else:
        fractions = torch.stack([problem.fractions["white"], problem.fractions["grey"]])
        D = monomials(tissues) @ mixture(fractions)
        by.append(D)
        u = form(start, D, leaves["rho"], leaves["age"])
    assert isinstance(problem.mass, Tensor)
    grads = torch.autograd.grad((0.5 * problem.mass * u**2).sum(), by)
    names = ["u", *leaves, "seed", "D(x)"]
    values = [x.detach().squeeze(-1) if x.shape[-1] == 1 else x.detach() for x in (u, *grads)]
    return {name: (x if many else x[0]).numpy() for name, x in zip(names, values, strict=False)}


def one_by_one(name: str, problem: SemiDiscrete, form: Run | Cohort, u0: Tensor) -> list[Check]:
    """Four patients at once against each alone: the state and the gradients that differ most."""
    together = found(problem, form, u0, PATIENTS)
    patients = []
    for i in range(len(PATIENTS["rho"])):
        alone = found(problem, form, u0, {key: values[i] for key, values in PATIENTS.items()})
        ours = {key: value[i] for key, value in together.items()}
        patients.append(compared(f"4 patients at once, {name}", ours, alone))
    # Each by itself: their bars differ.
    return [max(same, key=lambda check: _size(float(check.value))) for same in zip(*patients, strict=True)]


def _size(value: float) -> float:
    """For max(): a NaN is the largest."""
    return math.inf if math.isnan(value) else value
