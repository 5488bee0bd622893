"""Many tumours at once against one after the other, and a cohort's identification as one problem."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor
from torch.autograd import forward_ad

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.stopping import GradientTolerance, MaxIterations, Rule
from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.export import dof_numbers, export, gathered
from solvers.fem.mesh import voxels
from solvers.node.science.activated import Stepped, Unknown
from solvers.node.science.cohort import Cohort, Form
from solvers.node.weights import Parameters
from solvers.semidiscrete import SemiDiscrete
from solvers.spaces import Euclidean
from tumour.growth import LAWS
from tumour.model import Seed, TumourModel

FORMS: tuple[Form, ...] = ("compiled", "voxels")
BATCH, STEPS = 10, 6


@cache
def model(law: str = "logistic") -> TumourModel:
    """A ball of voxels of 3 mm, white inside, grey outside, mixed between."""
    centres = np.stack(np.meshgrid(*[(np.arange(9) - 4) * 3.0] * 3, indexing="ij"), -1)
    r = np.linalg.norm(centres, axis=-1)
    white = np.clip((9.0 - r) / 3.0, 0.0, 1.0)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = -12.0
    domain = voxels(r < 13.0, affine, {"white": white, "grey": 1.0 - white}, MPI.COMM_SELF)
    return TumourModel(domain, LAWS[law](), Seed(width=3.0))


@cache
def problem() -> SemiDiscrete:
    return export(model().domain, "a ball")


def numbers(batch: int = BATCH) -> dict[str, Any]:
    """Each patient's own: D over a factor of ten, ages over two."""
    draw = torch.rand(4, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {
        "D_white": 0.08 * 10 ** draw[0],
        "D_grey": 0.01 * 10 ** draw[1],
        "rho": 0.01 + 0.03 * draw[2],
        "age": 40.0 + 40.0 * draw[3],
    }


def seeds(batch: int = BATCH) -> Tensor:
    """In the problem's own numbering."""
    shifts = torch.rand(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 6 - 3
    return torch.stack([gathered(model().domain.V, model().seed_state(shift)) for shift in shifts])


def singly(u: Tensor, m: dict[str, Any], law: str = "logistic", steps: int = STEPS) -> Tensor:
    """The same, one TumourModel run after the other."""
    one, found = model(law), []
    numbers = torch.from_numpy(dof_numbers(one.domain.V))
    for i in range(len(u)):
        D = one.diffusivity(m["D_white"][i], m["D_grey"][i])
        (last,) = one.evolve(u[i][numbers], D, m["rho"][i], m["age"][i], age_steps=steps)
        found.append(last[torch.argsort(numbers)])
    assert one.diffusion.fallbacks == 0
    return torch.stack(found)


def leaves(m: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone().requires_grad_() for name, x in m.items()}


@pytest.mark.parametrize("form", FORMS)
def test_each_tumour_is_its_own_single_run(form: Form) -> None:
    u, m = seeds(), leaves(numbers())
    again = leaves(numbers())
    cotangent = torch.rand(u.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 0.5
    found, expected = Cohort(problem(), form=form)(u, **m, steps=STEPS), singly(u, again)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(
        torch.autograd.grad(found, list(m.values()), cotangent),
        torch.autograd.grad(expected, list(again.values()), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("law", ["gompertz", "exponential"])
def test_other_growth_laws(law: str) -> None:
    """In steps so short that Gompertz's flow needs no substeps, which are those of the fastest of a chunk."""
    u, m = seeds(3), numbers(3)
    found = Cohort(problem(), model(law).law.flow)(u, **m, steps=16)
    torch.testing.assert_close(found, singly(u, m, law, 16), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_single_precision_and_defaults(form: Form) -> None:
    u, m = seeds(3), leaves(numbers(3))
    plain = torch.autograd.grad(Cohort(problem(), form=form)(u, **m).square().sum(), list(m.values()))
    blocks = Cohort(problem(), form=form, checkpoint=3)(u, **m)
    for a, b in zip(plain, torch.autograd.grad(blocks.square().sum(), list(m.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    rough = Cohort(problem(), form=form, dtype=torch.float32)(u.float(), **numbers(3))
    assert rough.dtype == torch.float32 and float((rough - blocks).abs().max()) < 1e-5
    steps = 7  # of at most 10 days, for the oldest
    assert 10.0 * (steps - 1) < float(numbers(3)["age"].max()) <= 10.0 * steps
    torch.testing.assert_close(blocks, Cohort(problem(), form=form)(u, **m, steps=steps), rtol=1e-13, atol=0)


def test_forward_mode_is_the_difference_quotient() -> None:
    u, m, cohort = seeds(3), numbers(3), Cohort(problem())
    d = {name: 0.1 * x for name, x in m.items()}
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, d[name]) for name, x in m.items()}
        tangent = forward_ad.unpack_dual(cohort(u, **duals, steps=STEPS)).tangent
    plus, minus = (
        cohort(u, **{name: x + e * d[name] for name, x in m.items()}, steps=STEPS) for e in (1e-4, -1e-4)
    )
    torch.testing.assert_close(tangent, (plus - minus) / 2e-4, rtol=1e-6, atol=1e-8)


def test_a_file_is_all_it_needs(tmp_path: Path) -> None:
    problem().save(tmp_path / "ball.safetensors")
    cohort = Cohort(SemiDiscrete.load(tmp_path / "ball.safetensors"))
    u, m = seeds(2), numbers(2)
    torch.testing.assert_close(cohort(u, **m), Cohort(problem())(u, **m), rtol=0, atol=0)


def test_boxes_need_the_grid_and_the_fractions_alone() -> None:
    u, m = seeds(2), numbers(2)
    bare = Cohort(replace(problem(), conductances=None), form="voxels")
    torch.testing.assert_close(bare(u, **m), Cohort(problem())(u, **m), rtol=1e-12, atol=1e-14)


def test_fused_stages_are_one_graph_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as far as without a C++ compiler: the graphs are those that a device's compiler gets."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    u, m = seeds(3), leaves(numbers(3))
    found = Cohort(problem(), form="voxels", fused=True)(u, **m, steps=STEPS)
    expected = Cohort(problem(), form="voxels")(u, **m, steps=STEPS)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), list(m.values())),
        torch.autograd.grad(expected.sum(), list(m.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert len(graphs) == 2


@pytest.mark.gpu
def test_a_device_gives_the_same_numbers() -> None:
    u, m = seeds(), leaves(numbers())
    found, expected = Cohort(problem(), device="cuda")(u.cuda(), **m), Cohort(problem())(u, **m)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-11, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), list(m.values())),
        torch.autograd.grad(expected.sum(), list(m.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_steps_one_by_one_are_closed_strang_steps() -> None:
    u, m, cohort = seeds(3), numbers(3), Cohort(problem())
    age, rest = m.pop("age"), list(m.values())
    one = singly(u, {**m, "age": age}, steps=1)
    torch.testing.assert_close(cohort.step(u, age, *rest), one, rtol=1e-12, atol=1e-14)
    # By batch members of their own as by an Evolution, whose step is a number.
    repeated = Evolution(cohort.step)(u, 30.0, 3, *rest)
    by_hand = cohort.step(cohort.step(cohort.step(u, 10.0, *rest), 10.0, *rest), 10.0, *rest)
    torch.testing.assert_close(repeated, by_hand, rtol=1e-13, atol=0)


def test_a_cohort_is_identified_by_one_problem() -> None:
    """D_white and rho of ten patients from their last scans, by Gauss-Newton on one tape."""
    u, m, cohort = seeds(), numbers(), Cohort(problem())
    truth = torch.stack([m["D_white"], m["rho"]]).log().reshape(-1)

    def last(logs: Tensor) -> Tensor:
        D, rho = logs.exp().view(2, BATCH)
        return cohort(u, D, m["D_grey"], rho, m["age"], steps=STEPS)

    data = LeastSquares(Euclidean(len(truth)), last, last(truth), noise=1e-3)
    rules: list[Rule] = [GradientTolerance(1e-8), MaxIterations(20)]
    guess = truth + 0.3 * torch.sin(torch.arange(len(truth)).double())
    result = gauss_newton.minimise(data, guess, stopping=rules)
    torch.testing.assert_close(result.m, truth, rtol=0, atol=1e-5)


def test_unknowns_that_vary_in_time_train_a_network_of_cohort_steps() -> None:
    u, m, cohort = seeds(2), numbers(2), Cohort(problem())
    rates = Unknown(torch.tensor([0.02, 0.03], dtype=torch.float64), depth="linear", knots=3, duration=30.0)

    def step(u: Tensor, dt: float, rho: Tensor) -> Tensor:
        return cohort.step(u, dt, m["D_white"], m["D_grey"], rho)

    network = Stepped(step, {"rho": rates}, duration=30.0, steps=3)
    parameters = Parameters(network)
    at = parameters.pack().requires_grad_()

    def total(at: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(network, dict(parameters.unpack(at)), (u,))
        return out.square().sum()

    (gradient,) = torch.autograd.grad(total(at), at)
    assert gradient.shape == (6,) and bool((gradient > 0).all())
    h = torch.zeros(6).double()
    h[2] = 1e-5
    with torch.no_grad():
        difference = float(total(at + h) - total(at - h)) / 2e-5
    assert float(gradient[2]) == pytest.approx(difference, rel=1e-6)


def test_what_makes_no_sense_is_said_before_the_run() -> None:
    whole, u, m = problem(), seeds(3), numbers(3)
    cohort = Cohort(whole)
    with pytest.raises(GliodeError, match=r"u0: shape \(3, 5\)"):
        cohort(u[:, :5], **m)
    with pytest.raises(GliodeError, match=r"u0: torch.float32 on cpu, this cohort is torch.float64"):
        cohort(u.float(), **m)
    with pytest.raises(GliodeError, match=r"batch: the sizes differ, .*'rho': 2"):
        cohort(u, **{**m, "rho": m["rho"][:2]})
    with pytest.raises(GliodeError, match=r"D_grey: .*not negative"):
        cohort(u, **{**m, "D_grey": -m["D_grey"]})
    with pytest.raises(GliodeError, match=r"rho: .*finite"):
        cohort(u, **{**m, "rho": float("nan")})
    with pytest.raises(GliodeError, match=r"rho: shape \(3, 2\)"):
        cohort(u, **{**m, "rho": torch.ones(3, 2)})
    with pytest.raises(GliodeError, match=r"age: .* must be positive"):
        cohort(u, **{**m, "age": 0.0})
    for steps in (0, -2):
        with pytest.raises(GliodeError, match=rf"steps: {steps} must be positive"):
            cohort(u, **m, steps=steps)
    with pytest.raises(GliodeError, match=r"stages: 2 are stable up to .* days .* the step is 4 days"):
        Cohort(whole, stages=2)(u, **{**m, "age": 80.0, "D_white": 3.0}, steps=10)
    with pytest.raises(GliodeError, match=r"fractions of grey, white are missing"):
        Cohort(replace(whole, fractions={}))
    with pytest.raises(GliodeError, match=r"no diffusion"):
        Cohort(replace(whole, conductances=None))
    with pytest.raises(GliodeError, match=r"'voxels' needs a voxel grid"):
        Cohort(replace(whole, grid=None, coordinates=whole.points), form="voxels")
    with pytest.raises(GliodeError, match=r"'compiled' runs on the CPU, not on cuda"):
        Cohort(whole, form="compiled", device="cuda")
    with pytest.raises(GliodeError, match=r"step: 0"):
        Cohort(whole, step=0)
