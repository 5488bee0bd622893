"""64 tumours at once on MNI152 against one after the other, forward and gradient; and a product's bandwidth.

Each has its own D_white, D_grey, rho and place; 3 mm, 200 days, 20 steps. On the CPU the rival is
`TumourModel`, the single solves of this very library, with the same steps, scheme and thread: processor
seconds of runs that take turns, eight single ones counted eight times. A product with K is compared with
SciPy's of each tumour's matrix, with SciPy's of the four matrices that all tumours share, and with what this
machine copies. On CUDA the torch formulation runs alone, in single precision, for which no DOLFINx is needed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.benchmarks import Check
from scripts.benchmarks._measures import relative
from solvers.node.science.cohort import Cohort
from solvers.node.science.voxels import VoxelOperator
from solvers.operators import mixture, monomials
from solvers.semidiscrete import Grid, SemiDiscrete
from tumour.anatomy import mni152

BATCH, DAYS, STEPS = 64, 200.0, 20
NAMES = ("D_white", "D_grey", "rho", "age")


def run(full: bool, device: str = "cpu") -> list[Check]:
    """Throughput and bandwidth."""
    torch.set_num_threads(1)
    if device == "cuda":
        return graphics(device, 3.0, 1.0, BATCH)
    return [*processor(5 if full else 3, full), Check("load average", os.getloadavg()[0], "processes")]


def patients(batch: int, seed: int = 11) -> dict[str, Any]:
    """Numbers of each tumour: D and rho over a factor of five and three, logarithmically."""
    draw = torch.rand(3, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    D_white, rho = 0.1 * 5 ** draw[0], 0.01 * 3 ** draw[2]
    age = torch.full((batch,), DAYS, dtype=torch.float64)
    return {"D_white": D_white, "D_grey": D_white * (0.1 + 0.2 * draw[1]), "rho": rho, "age": age}


def seeds(points: Tensor, batch: int, width: float = 4.0) -> Tensor:
    """Gaussians (batch, n) about vertices within 30 mm of a point in the left hemisphere."""
    near = (points - torch.tensor([-28.0, -14.0, 26.0])).square().sum(1) < 30.0**2
    places = near.nonzero()[:, 0]
    chosen = places[torch.randint(len(places), (batch,), generator=torch.Generator().manual_seed(5))]
    return 0.5 * torch.exp(-torch.cdist(points[chosen], points).square() / (2 * width**2))


def seconds(run: Callable[[], Any]) -> float:
    """Processor seconds of one call (one thread: what others run beside it counts little)."""
    start = time.process_time()
    run()
    return time.process_time() - start


# ---- On the CPU -------------------------------------------------------------------------------------------


def processor(rounds: int, full: bool, h: float = 3.0, batch: int = BATCH, few: int = 8) -> list[Check]:
    """The cohort against single finite-element solves, taking turns."""
    from solvers.fem.export import dof_numbers, export
    from tumour.model import TumourModel, domain_of

    domain = domain_of(mni152(h))
    model, problem = TumourModel(domain), export(domain, f"MNI152, {h:g} mm")
    cohort, mass = Cohort(problem), domain.mass
    u0, m = seeds(problem.points, batch), patients(batch)
    order = torch.from_numpy(dof_numbers(domain.V))
    back = torch.argsort(order)
    alone = u0[:few][:, order]

    def together(**numbers: Tensor) -> Tensor:
        return cohort(u0, **{**m, **numbers}, steps=STEPS)

    def single(i: int, **numbers: Tensor) -> Tensor:
        own = {name: (numbers or m)[name][i] for name in NAMES}
        D = model.diffusivity(own["D_white"], own["D_grey"])
        return model.evolve(alone[i], D, own["rho"], own["age"], age_steps=STEPS)[0]

    def gradients(run: Callable[..., Tensor], weight: Any) -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in m.items()}
        cost = 0.5 * (weight * run(**leaves).square()).sum()
        return list(torch.autograd.grad(cost, list(leaves.values())))

    with torch.no_grad():
        state, states = together(), [single(i)[back] for i in range(few)]
    ours = gradients(together, problem.mass)
    theirs = [gradients(partial(single, i), mass) for i in range(few)]
    errors = [relative(state[i], states[i]) for i in range(few)]
    gaps = [relative(a[i], b[i]) for i in range(few) for a, b in zip(ours, theirs[i], strict=True)]
    checks = [
        Check(f"vertices at {h:g} mm, {batch} tumours", problem.n),
        Check.at_most(f"states of {few}, relative to single runs", max(errors), 1e-6),
        Check.at_most(f"gradients of {few}, relative to single runs", max(gaps), 1e-5),
    ]

    def forward() -> None:
        with torch.no_grad():
            together()

    def forward_each() -> None:
        with torch.no_grad():
            for i in range(few):
                single(i)

    def gradient_each() -> None:
        for i in range(few):
            gradients(partial(single, i), mass)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (forward, forward_each),
        "value and gradient": (partial(gradients, together, problem.mass), gradient_each),
    }
    for what, (all_at_once, one_by_one) in pairs.items():
        times = [(seconds(all_at_once) / batch, seconds(one_by_one) / few) for _ in range(rounds)]
        ratio = statistics.median(b / a for a, b in times)
        a, b = (min(column) for column in zip(*times, strict=True))
        label = f"{what}: tumours a second, times those of single solves (goal 2)"
        checks += [
            Check(f"{what}: a tumour of {batch} ({b * 1e3:.1f} ms alone)", a * 1e3, "ms"),
            Check.at_least(label, ratio, 1.0),
        ]
    if full:
        checks.append(Check("forward: 2 threads over 1, by the clock", threads(forward), "times"))
    return [*checks, *products(cohort, problem, m, u0)]


def threads(run: Callable[[], None]) -> float:
    """How many times faster two threads are."""
    best: dict[int, float] = {}
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        start = time.perf_counter()
        run()
        best[count] = min(best.get(count, np.inf), time.perf_counter() - start)
    torch.set_num_threads(1)
    return best[1] / best[2]


def bandwidth(megabytes: int = 256) -> float:
    """GB/s that a copy reads and writes."""
    x = np.ones(megabytes * 2**17)
    y = np.empty_like(x)
    return 2e-9 * x.nbytes / min(seconds(lambda: np.copyto(y, x)) for _ in range(6))


def products(cohort: Cohort, problem: SemiDiscrete, m: dict[str, Tensor], u: Tensor) -> list[Check]:
    """One product with each tumour's K, in milliseconds a tumour, by each way to do it."""
    from scipy.sparse import coo_matrix

    from solvers.fem.kernels import Stage

    pairs, n, batch, few = problem.conductances, problem.n, len(u), 8
    assert pairs is not None
    i, j = pairs.first.numpy(), pairs.second.numpy()
    shared = pairs(mixture_of(problem))
    theta = monomials(torch.stack([m["D_white"], m["D_grey"]], 1))

    def matrix(w: Any) -> Any:
        diagonal = np.bincount(i, w, n) + np.bincount(j, w, n)
        rows, columns = np.concatenate([np.arange(n), i, j]), np.concatenate([np.arange(n), j, i])
        return coo_matrix((np.concatenate([diagonal, -w, -w]), (rows, columns)), shape=(n, n)).tocsr()

    weights = (theta[:few] @ shared).numpy()
    own, terms, dense = (
        [matrix(w) for w in weights],
        [matrix(w.numpy()) for w in shared],
        u.T.contiguous().numpy(),
    )
    factors, q = theta.numpy(), np.empty(n)
    start = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=n))])
    stage, columns = Stage(start, j), [np.ascontiguousarray(x) for x in u[:few].numpy()]
    lanes: Any = cohort.operator
    chunks, numbers = lanes.box(u), lanes.weights(theta)[0]
    base, table = torch.zeros_like(chunks), torch.ones(5, 1, lanes.width, dtype=torch.float64)
    assert problem.grid is not None
    voxel = VoxelOperator(problem.grid)
    boxes, w = voxel.box(u[:few]), voxel.conductances(theta[:few] @ mixture_of(problem))

    def compiled() -> None:
        for c in range(len(chunks)):
            lanes.advance([numbers[c]], chunks[c], base[c], table, spare=base[c])

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "SciPy, a matrix for each": (lambda: [A @ x for A, x in zip(own, columns, strict=True)], few),
        "SciPy, four matrices for all": (
            lambda: sum((A @ dense) * f for A, f in zip(terms, factors.T, strict=True)),
            batch,
        ),
        "single kernel of DOLFINx's form": (
            lambda: [stage(*ax, q) for ax in zip(weights, columns, strict=True)],  # type: ignore[func-returns-value]
            few,
        ),
        "matrix-free in torch": (lambda: voxel.stiffness(w, boxes), few),
        "compiled, for chunks": (compiled, batch),
    }
    found = {name: [np.inf, count] for name, (_, count) in ways.items()}
    for _ in range(5):
        for name, (way, _) in ways.items():
            found[name][0] = min(found[name][0], seconds(way))
    checks = [Check(f"product: {name}", 1e3 * t / count, "ms a tumour") for name, (t, count) in found.items()]
    # Every state once, z twice; the pairs' shares and ends, the masses and the rows once for each chunk.
    moved = len(chunks) * (3 * n * lanes.width * 8 + len(i) * (len(shared) * 8 + 4) + n * 12)
    speed, copied = 1e-9 * moved / found["compiled, for chunks"][0], bandwidth()
    return [
        *checks,
        Check("memory: a copy of 256 MB", copied, "GB/s"),
        Check("memory: the compiled product's share of it", speed / copied),
    ]


def mixture_of(problem: SemiDiscrete) -> Tensor:
    """The fields of white and grey matter."""
    return mixture(torch.stack([problem.fractions["white"], problem.fractions["grey"]]))


# ---- The torch formulation: on CUDA, and for tests on the CPU ---------------------------------------------


def voxel_problem(h: float) -> SemiDiscrete:
    """What the voxel form needs of MNI152: no DOLFINx, no conductances."""
    anatomy = mni152(h)
    voxel = torch.from_numpy(np.argwhere(anatomy.brain)).to(torch.int32)
    corners = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=torch.int32)
    corner = torch.unique((voxel[:, None] + corners).reshape(-1, 3), dim=0)
    shape = anatomy.brain.shape
    grid = Grid((shape[0], shape[1], shape[2]), torch.from_numpy(np.array(anatomy.affine)), voxel, corner)
    white, grey = (torch.from_numpy(np.array(x[anatomy.brain])) for x in (anatomy.white, anatomy.grey))
    operator = VoxelOperator(grid)
    mass = operator.states(operator.mass[None])[0]
    return SemiDiscrete(
        mass, fractions={"white": white / (white + grey), "grey": grey / (white + grey)}, grid=grid
    )


def clock(run: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """The best wall-clock seconds of a call, after one that is not counted."""
    best = np.inf
    for count in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if count else best
    return best


def graphics(
    device: str, h: float, fine: float, batch: int, fusing: tuple[bool, ...] = (False, True)
) -> list[Check]:
    """Forward, gradient and bandwidth of the voxel form at h mm, and one whole brain at `fine` mm."""
    checks, single = [], torch.float32
    problem, m = voxel_problem(h), patients(batch)
    u0 = seeds(problem.points, batch)
    exact = Cohort(problem, form="voxels")(u0[:2], **{key: x[:2] for key, x in m.items()}, steps=STEPS)
    u0 = u0.to(device, single)
    large, other = torch.ones(2, 2**26, dtype=single, device=device)
    copied = 2 * large.nbytes / clock(lambda: other.copy_(large), device)
    whole = voxel_problem(fine)
    start, one = seeds(whole.points, 1).to(device, single), patients(1)
    for fused in fusing:
        name = "torch.compile" if fused else "torch"
        cohort = Cohort(problem, form="voxels", dtype=single, device=device, fused=fused)
        fine_cohort = Cohort(whole, form="voxels", dtype=single, device=device, fused=fused)

        @torch.no_grad()
        def forward(cohort: Cohort = cohort) -> Tensor:
            return cohort(u0, **m, steps=STEPS)

        def gradient(cohort: Cohort = cohort) -> None:
            leaves: dict[str, Any] = {key: x.clone().requires_grad_() for key, x in m.items()}
            torch.autograd.grad(cohort(u0, **leaves, steps=STEPS).square().sum(), list(leaves.values()))

        @torch.no_grad()
        def brain(cohort: Cohort = fine_cohort) -> Tensor:
            return cohort(start, **one, steps=STEPS)

        try:
            found = forward()[:2].cpu().double()
        except (RuntimeError, ImportError) as error:  # no compiler, no Triton
            if not fused:
                raise
            checks.append(Check(name, f"not here: {str(error).splitlines()[0][:60]}"))
            continue
        share, bare = (speed / copied for speed in stage_bandwidth(cohort, u0, m, device))
        checks += [
            Check.at_most(
                f"{name}: single precision against double on the CPU", relative(found, exact), 1e-4
            ),
            Check(f"{name}: forward, {batch} at {h:g} mm", clock(forward, device) / batch, "s a tumour"),
            Check(f"{name}: value and gradient", clock(gradient, device, 2) / batch, "s a tumour"),
            Check(
                f"{name}: a stage's share of the copy's {copied * 1e-9:.0f} GB/s (goal 0.5; {bare:.2f} "
                "without the stored weights)",
                share,
            ),
            Check(
                f"{name}: whole brain at {fine:g} mm, {whole.n} vertices (goal 0.25)",
                clock(brain, device),
                "s",
            ),
        ]
    return checks


def stage_bandwidth(cohort: Cohort, u: Tensor, m: dict[str, Tensor], device: str) -> tuple[float, float]:
    """Bytes a second of one stage, counting what it moves: a, base, three weights and z; and all but the
    weights, which are stored, not made from D: what another form would have to move.
    """
    operator: Any = cohort.operator
    theta = monomials(torch.stack([m["D_white"], m["D_grey"]], 1)).to(u)
    a, w = operator.box(u), operator.weights(theta)
    base, table = torch.zeros_like(a), torch.ones(5, len(a), 1, 1, 1, dtype=u.dtype, device=u.device)
    took = clock(lambda: operator.advance(w, a, base, table), device)
    states = 3 * a.nbytes
    return (states + sum(x.nbytes for x in w)) / took, states / took
