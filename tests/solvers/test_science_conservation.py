"""Discontinuous Galerkin on arrays against closed forms, the tableau, eigenvalues and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.verification import check_adjoint
from solvers.errors import Diverged, GliodeError
from solvers.evolution import Evolution
from solvers.node.models import Node
from solvers.node.science import riemann
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.conservation import DG, SSPStep
from solvers.node.science.elements import Elements, interval, rectangle
from solvers.node.science.laws import COURANT, Burgers, Euler, Law, ShallowWater, courant, require_courant
from solvers.node.weights import Parameters
from solvers.ode.integrate import integrate
from solvers.spaces import Euclidean

F64 = torch.float64
WAVE = (0.5, 0.3)  # mean and amplitude
GAS = Euler()


def wave(t: float, *parameters: float) -> Callable[[Tensor], list[Tensor]]:
    mean, amplitude, phase, speed = (*parameters, *(*WAVE, 0.0, 1.0)[len(parameters) :])
    return lambda x: [
        torch.from_numpy(riemann.burgers_wave(x[..., 0].numpy(), t, mean, amplitude, phase, speed))
    ]


def sides(left: Sequence[float], right: Sequence[float], at: float = 0.0) -> Callable[[Tensor], list[Tensor]]:
    """Two constant states with a jump."""
    return lambda x: [
        torch.where(x[..., 0] < at, torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64))
        for a, b in zip(left, right, strict=True)
    ]


def run(field: DG, u: Tensor, duration: float, slack: float, *w: Any) -> Tensor:
    """In the steps that the start allows, `slack` times as many."""
    steps = math.ceil(slack * duration / field.largest_step(u, *w))
    return Evolution(SSPStep(field))(u, duration, steps, *w)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_smooth_solutions_have_the_order_of_the_elements(degree: int) -> None:
    errors = []
    for cells in (20, 40):
        field = DG(Burgers(), interval(0, 1, cells, degree, periodic=True))
        u = run(field, field.elements.project(wave(0.0)), 0.2, 1.05)
        errors.append(float(field.elements.distance(u, wave(0.2), 2)))
    assert math.log2(errors[0] / errors[1]) > degree + 0.85
    assert errors[1] < (0.02, 5e-4, 1e-5)[degree]


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_courant_number_is_that_of_the_eigenvalues(degree: int) -> None:
    """Linearised at u = 1: upwind advection of speed 1; the stability function of order 3 on its spectrum."""
    cells = 24
    field = DG(Burgers(), interval(0, cells, cells, degree, periodic=True))
    one = torch.ones(cells, degree + 1, 1, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda u: field(0.0, u), one).reshape(one.numel(), -1)
    z = np.linalg.eigvals(jacobian.numpy())

    def growth(courant: float) -> float:
        h = courant * z
        return float(np.abs(1 + h + h**2 / 2 + h**3 / 6).max())

    assert growth(COURANT[degree]) < 1 + 1e-6
    assert growth((1.27, 0.42, 0.214, 0.135)[degree]) > 1 + 1e-6  # its own limit, positivity aside


def test_ssp_steps_without_a_limiter_are_the_tableau() -> None:
    field = DG(Burgers(), interval(0, 1, 16, 2, periodic=True))
    u = field.elements.project(wave(0.0))
    times = torch.linspace(0, 0.1, 13, dtype=F64)
    expected = integrate(lambda t, x: field(t, x), u, times, "ssp3")
    torch.testing.assert_close(Evolution(SSPStep(field))(u, 0.1, 12), expected, rtol=0, atol=1e-14)


def test_shock_and_rarefaction_of_burgers_are_the_entropy_solution() -> None:
    """A hat, 1 on (-1/2, 1/2) and -1/2 elsewhere: a rarefaction and a shock of speed 1/4; total variation and
    entropy never grow, and the mass stays.
    """

    def exact(x: Tensor) -> list[Tensor]:
        at = x[..., 0].numpy()
        fan, shock = riemann.burgers(at + 0.5, 0.4, -0.5, 1.0), riemann.burgers(at - 0.5, 0.4, 1.0, -0.5)
        return [torch.from_numpy(np.where(at < 0.2, fan, shock))]

    errors = []
    for cells in (50, 100):
        e = interval(-1, 1, cells, 1, periodic=True)
        field = DG(Burgers(), e, tvb=0.0)
        step = SSPStep(field)
        hat = e.project(lambda x: [torch.where(x[..., 0].abs() < 0.5, 1.0, -0.5).to(F64)])
        u = start = field.limit(hat)
        for _ in range(steps := cells // 2 + 5):
            new = step(u, 0.4 / steps)
            variation = [
                float((m - m.roll(1, 0)).abs().sum()) for m in (e.means(u)[:, 0], e.means(new)[:, 0])
            ]
            entropy = [float((e.evaluate(v)[..., 0] ** 2 * e.weights).sum()) for v in (u, new)]
            assert variation[1] < variation[0] + 1e-13 and entropy[1] < entropy[0] + 1e-13
            u = new
        assert float((e.integral(u) - e.integral(start)).abs()) < 1e-14
        errors.append(float(e.distance(u, exact)) / 2)
    assert errors[1] < 0.01 and errors[0] > 1.6 * errors[1]


def test_sods_tube_is_the_exact_riemann_solution() -> None:
    def exact(x: Tensor) -> list[Tensor]:
        rho, v, p = riemann.euler(x[..., 0].numpy(), 0.2)
        return [torch.from_numpy(part) for part in GAS.state(rho, [v], p)]

    left, right = ([float(c) for c in GAS.state(s[0], [s[1]], s[2])] for s in riemann.SOD)
    for degree in (1, 2):
        field = DG(GAS, interval(-0.5, 0.5, 100, degree), tvb=0.0)
        u = run(field, field.elements.project(sides(left, right)), 0.2, 2.3)
        errors = field.elements.distance(u, exact)
        assert errors.max() < 0.01 and errors[0] < 0.005, errors
        means = field.elements.means(u)[:, 0]
        assert float(means.diff().abs().sum()) < 1.005 * 0.875  # no oscillations to speak of
        assert means.min() > 0.1249 and means.max() < 1.0001


def test_density_and_pressure_stay_positive_next_to_a_vacuum() -> None:
    """Two rarefactions (Einfeldt's 1-2-0-3): without the limiter this breaks down."""
    left, right = ([float(c) for c in GAS.state(1.0, [v], 0.4)] for v in (-2.0, 2.0))
    e = interval(-0.5, 0.5, 50, 1)
    u = e.project(sides(left, right))
    for field in (DG(GAS, e), DG(GAS, e, tvb=0.0)):
        v = run(field, u, 0.15, 1.3)
        for at in (e.traces @ v, e.evaluate(v)):
            rho, p = GAS.positive(at.unbind(-1), 1.4)
            assert rho.min() > 0 and p.min() > 0
        exact = torch.from_numpy(
            riemann.euler(e.points.mean(1)[:, 0].numpy(), 0.15, (1.0, -2.0, 0.4), (1.0, 2.0, 0.4))[0]
        )
        assert float((e.means(v)[:, 0] - exact).abs().mean()) < 0.02
    u[25] *= torch.tensor([-1.0, 1.0, 1.0], dtype=F64)
    with pytest.raises(Diverged, match="cell mean of -1"):
        field.limit(u)
    with pytest.raises(Diverged, match="pressure is negative; the run has already broken down"):
        SSPStep(field)(u, 1e-4)


def test_a_dam_breaks_as_in_the_closed_form_and_a_wall_is_a_mirror() -> None:
    law = ShallowWater()

    def exact(x: Tensor) -> list[Tensor]:
        h, v = riemann.dam_break(x[..., 0].numpy(), 0.6, 2.0, 1.0)
        return [torch.from_numpy(h), torch.from_numpy(h * v)]

    field = DG(law, interval(-5, 5, 100, 1), tvb=0.0)
    u = run(field, field.elements.project(sides((2.0, 0.0), (1.0, 0.0))), 0.6, 1.3)
    errors = field.elements.distance(u, exact) / 10
    assert errors[0] < 0.01 and errors[1] < 0.03, errors

    half = DG(law, interval(0, 5, 40, 1), boundary="wall", tvb=0.0)
    whole = DG(law, interval(-5, 5, 80, 1), boundary="wall", tvb=0.0)
    short = half.elements.project(sides((2.0, 0.0), (1.0, 0.0), 2.0))
    long = whole.elements.project(
        lambda x: [torch.where(x[..., 0].abs() < 2, 2.0, 1.0).to(F64), 0 * x[..., 0]]
    )
    dt, step, mirrored = 0.009, SSPStep(half), SSPStep(whole)
    for _ in range(80):
        short, long = step(short, dt), mirrored(long, dt)
    near = slice(45, 80)  # next to the mirror the end's slopes are bounded from one side only
    torch.testing.assert_close(
        whole.elements.means(long)[near], half.elements.means(short)[5:], rtol=0.01, atol=0.01
    )
    gained = half.elements.integral(short)[0] - half.elements.integral(half.elements.project(
        sides((2.0, 0.0), (1.0, 0.0), 2.0)))[0]  # fmt: skip
    assert abs(float(gained)) < 1e-13


@pytest.mark.parametrize("law", [Burgers(2), ShallowWater(2), Euler(2), Euler(1)])
def test_speeds_are_the_largest_eigenvalues_of_the_flux(law: Law) -> None:
    u = torch.tensor([1.3, 0.4, -0.7, 3.0][: law.components] if law.dim == 2 else [1.3, 0.4, 3.0], dtype=F64)
    n = torch.tensor([0.6, 0.8] if law.dim == 2 else [1.0], dtype=F64)
    w = list(law.parameters.values())

    def along(u: Tensor) -> Tensor:
        rows = law.flux(u.unbind(0), *w)
        return torch.stack([sum(row[d] * n[d] for d in range(law.dim)) for row in rows])

    jacobian = torch.autograd.functional.jacobian(along, u).numpy()
    expected = np.abs(np.linalg.eigvals(jacobian)).max()
    assert float(law.speed(u.unbind(0), n.tolist(), *w)) == pytest.approx(expected, rel=1e-12)


def test_an_isentropic_vortex_is_carried_along_at_second_order() -> None:
    law = Euler(2)

    def exact(t: float) -> Callable[[Tensor], list[Tensor]]:
        def state(x: Tensor) -> list[Tensor]:
            rho, v, w, p = riemann.vortex(x[..., 0].numpy(), x[..., 1].numpy(), t)
            return [torch.from_numpy(np.asarray(part)) for part in law.state(rho, [v, w], p)]

        return state

    errors = []
    for cells in (16, 32):
        field = DG(law, rectangle((-5, -5), (5, 5), (cells, cells), 1, periodic=True))
        start = field.elements.project(exact(0.0))
        u = run(field, start, 0.5, 1.05)
        total = (field.elements.integral(u) - field.elements.integral(start)).abs().max()
        assert float(total) < 1e-11
        errors.append(float(field.elements.distance(u, exact(0.5), 2)[0]))
    assert errors[1] < 0.007 and math.log2(errors[0] / errors[1]) > 1.8


@pytest.mark.parametrize(("law", "tvb"), [(ShallowWater, None), (Burgers, 0.0)])
def test_a_plane_wave_in_two_dimensions_is_the_one_in_one(law: type[Law], tvb: float | None) -> None:
    """For one component the limiter too."""

    def hump(x: Tensor) -> list[Tensor]:
        return [1 + 0.5 * torch.exp(-20 * x[..., 0] ** 2), 0.1 + 0 * x[..., 0]][: law(1).components]

    a = DG(law(2), rectangle((-1, 0), (1, 0.3), (12, 3), 1, periodic=True), tvb=tvb)
    b = DG(law(1), interval(-1, 1, 12, 1, periodic=True), tvb=tvb)
    v = b.elements.project(hump)
    u = a.elements.project(lambda x: [*hump(x), 0 * x[..., 0]][: law(2).components])
    for _ in range(8):
        u, v = SSPStep(a)(u, 0.002), SSPStep(b)(v, 0.002)
    strip = a.elements.means(u).view(12, 3, -1)
    count = law(1).components
    torch.testing.assert_close(strip[:, 1, :count], b.elements.means(v), rtol=0, atol=1e-13)
    assert float(strip[..., count:].abs().sum()) < 1e-12


def limited() -> tuple[DG, Tensor]:
    """A steep wave whose limiter works, and a kink nowhere near."""
    field = DG(Burgers(), interval(0, 1, 12, 2, periodic=True), tvb=0.0)
    return field, field.elements.project(lambda x: [0.2 + torch.sin(2 * math.pi * x[..., 0] + 0.3)])


def test_gradients_through_the_limiter_in_both_modes() -> None:
    field, u0 = limited()
    weights = torch.randn(u0.shape, dtype=F64, generator=torch.Generator().manual_seed(1))

    def forward(m: Tensor) -> Tensor:
        return (Evolution(SSPStep(field), checkpoint=2)(m[1] * u0, 0.04, 6, m[0]) * weights).sum(-1)

    moved = Evolution(SSPStep(field))(u0, 0.04, 6)
    off = DG(Burgers(), field.elements)
    assert float((moved - Evolution(SSPStep(off))(u0, 0.04, 6)).abs().max()) > 1e-3  # the limiter does work
    m = torch.tensor([1.1, 0.9], dtype=F64)
    data = torch.zeros_like(forward(m))
    checked = check_adjoint(LeastSquares(Euclidean(2), forward, data, noise=1.0), m)
    assert checked.passed, str(checked)


def test_a_batch_is_its_members_and_takes_a_number_each() -> None:
    field, u0 = limited()
    batch = torch.stack([u0, 0.5 * u0])
    speeds = torch.tensor([1.0, 1.3], dtype=F64)
    together = Evolution(SSPStep(field))(batch, 0.04, 6, speeds[:, None, None])
    for k in range(2):
        alone = Evolution(SSPStep(field))(batch[k], 0.04, 6, speeds[k])
        torch.testing.assert_close(together[k], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("law", "values"), [(Euler(), [1.4, 1.6]), (ShallowWater(), [9.81, 3.0])])
def test_a_batch_with_a_constant_each_is_limited_as_its_members(law: Law, values: list[float]) -> None:
    """Wave by wave, two jumps; and a batch of one."""
    field = DG(law, interval(-0.5, 0.5, 10, 1), tvb=0.0)
    high, low = [2.0, 0.0, 2.5][: law.components], [1.0, 0.1, 1.5][: law.components]
    u = field.elements.project(sides(high, low))
    u[4, 1] *= 1.02  # a slope to limit next to the jump
    for batch, w in (
        (torch.stack([u, 0.9 * u]), torch.tensor(values, dtype=F64)),
        (u[None], u.new_tensor(values[1:])),
    ):
        w = w[:, None, None]
        dt = 0.5 * field.largest_step(batch, w)
        together = Evolution(SSPStep(field))(batch, 4 * dt, 4, w)
        once = field.limit(batch, w)
        assert together.shape == batch.shape and not torch.equal(once, batch)
        for k in range(len(batch)):
            alone = Evolution(SSPStep(field))(batch[k], 4 * dt, 4, w[k, 0, 0])
            torch.testing.assert_close(together[k], alone, rtol=0, atol=1e-13)
            torch.testing.assert_close(once[k], field.limit(batch[k], float(w[k])), rtol=0, atol=1e-13)


def test_courant_numbers_and_what_they_refuse() -> None:
    """Linear stability (Cockburn and Shu 2001, table 2.2), or the end weight of Gauss-Lobatto."""
    stable, weight = (1.0, 0.409, 0.209, 0.130), (1.0, 1 / 2, 1 / 6, 1 / 6)
    assert [courant(k) for k in range(4)] == pytest.approx([*map(min, stable, weight)], rel=1e-12)
    with pytest.raises(GliodeError, match="degree: 4"):
        courant(4)
    for dt in (0.0, 0.05, 0.1, 0.1 * (1 + 1e-10)):
        require_courant(dt, 0.1)
    require_courant(1e9, math.inf)
    for dt, largest, said in (
        (0.25, 0.1, "dt = 0.25 violates .* is 0.1: take 2.50 times"),
        (0.1001, 0.1, "take 1.01 times"),
        (0.1, 1e-309, "violates"),
        (0.1, math.nan, "not finite, or a density, depth or pressure is negative"),
        (0.1, 0.0, "not finite, or"),
    ):
        with pytest.raises(Diverged, match=said):
            require_courant(dt, largest)
    for dt in (-1e-3, math.nan, math.inf):
        for largest in (0.1, math.inf, math.nan):
            with pytest.raises(GliodeError, match=r"dt = .*not negative") as error:
                require_courant(dt, largest)
            assert not isinstance(error.value, Diverged)  # no trial point, a mistake


def test_no_step_goes_back_in_time() -> None:
    field, u = limited()
    with pytest.raises(GliodeError, match="dt = -0"):
        SSPStep(field)(u, -1e-3)


def test_as_the_activation_of_a_network_it_is_the_same_run() -> None:
    """`Node` with the tape-free adjoint against the steps on the tape."""
    field = DG(Burgers(), interval(0, 1, 12, 1, periodic=True))
    u = field.elements.project(wave(0.0))
    node = Node(ScienceActivated(field, {"speed": Unknown(1.2)}), duration=0.1, steps=8, scheme="ssp3")
    trained = Parameters(node)
    m = trained.pack().requires_grad_()
    found = torch.func.functional_call(node, dict(trained.unpack(m)), (u,))
    expected = Evolution(SSPStep(field))(u, 0.1, 8, m[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    (ours,), (theirs,) = (torch.autograd.grad((v**3).sum(), m, retain_graph=True) for v in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)


def test_the_flux_and_the_initial_state_are_identified_before_the_shock() -> None:
    """Speed factor, amplitude and phase of a wave from its cell means at two times, 1 % noise; the data are
    the closed form's.
    """
    truth = torch.tensor([1.0, 0.3, 1.0], dtype=F64)
    field = DG(Burgers(), interval(0, 1, 20, 1, periodic=True))
    e = field.elements

    def forward(m: Tensor) -> Tensor:
        u = e.project(lambda x: [WAVE[0] + m[1] * torch.sin(2 * math.pi * x[..., 0] + m[2])])
        middle = Evolution(SSPStep(field))(u, 0.15, 9, m[0])
        return torch.stack([e.means(middle), e.means(Evolution(SSPStep(field))(middle, 0.15, 9, m[0]))])

    clean = torch.stack([e.means(e.project(wave(t, WAVE[0], 0.3, 1.0, 1.0))) for t in (0.15, 0.3)])
    noise = 0.01 * float(clean.abs().max())
    data = clean + noise * torch.randn(clean.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    problem = LeastSquares(Euclidean(3), forward, data, noise)
    start = torch.tensor([0.9, 0.25, 0.8], dtype=F64)
    found = gauss_newton.minimise(problem, start, jacobian_updates=True)
    assert float((found.m / truth - 1).abs().max()) < 0.05, found.m


def test_a_step_beyond_the_cfl_condition_names_the_largest_stable_one() -> None:
    field, u = limited()
    largest = field.largest_step(u)
    assert largest == pytest.approx(
        COURANT[2] / 12 / float((field.elements.traces @ u).abs().max()), rel=1e-12
    )
    with pytest.raises(GliodeError, match=rf"CFL condition; the largest stable step here is {largest:.4g}"):
        SSPStep(field)(u, 1.01 * largest)
    assert torch.isfinite(SSPStep(field)(u, largest)).all()
    with pytest.raises(GliodeError, match="not finite"):
        SSPStep(field)(u * math.nan, largest)


def elements() -> Elements:
    return interval(0, 1, 4, 1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DG(Burgers(2), elements()), "dim"),
        (lambda: DG(Burgers(), elements(), boundary="wall"), "wall"),
        (lambda: DG(Burgers(), elements(), boundary="periodic"), "'outflow'"),
        (lambda: DG(Euler(), elements(), boundary=[1.0, 2.0]), "3 components"),
        (lambda: DG(Burgers(), elements(), tvb=-1.0), "tvb"),
        (lambda: DG(Burgers(), elements())(0.0, torch.zeros(4, 2, 3, dtype=F64)), "state"),
        (lambda: DG(Burgers(), elements())(0.0, torch.zeros(4, 2, 1)), "float32"),
        (lambda: DG(Burgers(), elements())(0.0, torch.zeros(4, 2, 1, dtype=F64), sped=1.0), "sped"),
        (lambda: interval(0, 1, 4, 4), "degree"),
        (lambda: interval(1, 0, 4, 1), "increasing"),
        (lambda: rectangle((0, 0), (1, 1), (2, 5), 1, periodic=True), "3 cells"),
        (lambda: Euler(3), "dim"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(GliodeError, match=match):
        make()


@pytest.mark.gpu
def test_the_arrays_give_the_same_on_cuda() -> None:
    field, u0 = limited()
    there = DG(field.law, field.elements.to("cuda"), tvb=0.0)
    found = Evolution(SSPStep(there))(u0.cuda(), 0.04, 6)
    torch.testing.assert_close(found.cpu(), Evolution(SSPStep(field))(u0, 0.04, 6), rtol=0, atol=1e-12)
