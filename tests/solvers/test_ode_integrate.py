"""Integration and its three gradients: against each other, differences, the symplectic partner, a rival."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from solvers.errors import GliodeError
from solvers.ode.costate import backsolve
from solvers.ode.fields import Sampled, Saved, VectorField
from solvers.ode.integrate import Noise, integrate
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import TABLEAUX, tableau

DIM = 4
SCHEMES = [*TABLEAUX, "chebyshev5"]
WAYS = {
    "adjoint": {"gradient": "adjoint"},
    "adjoint, states": {"gradient": "adjoint", "store": "states"},
    "checkpointed": {"gradient": "checkpointed"},
}


class Perceptron(nn.Module):
    """f(t, x) of a module with parameters; one of them does not need a gradient."""

    def __init__(self, dim: int = DIM, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 3, dtype=dtype)
        self.outer = nn.Linear(3, dim, dtype=dtype)
        self.outer.bias.requires_grad_(False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        out: Tensor = (1 + t) * self.outer(torch.tanh(self.inner(x)))
        return out


class Knots(VectorField):
    """tanh(W(t) x), W piecewise linear on [0, 1]; the gradient from the tape of a stage, or by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.values = nn.Parameter(0.6 * torch.randn(3, DIM, DIM, dtype=torch.float64))

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        place = (2 * stages.reshape(-1)).clamp(0, 2)
        hats = (1 - (place[:, None] - torch.arange(3)).abs()).clamp(min=0)
        steps, s = stages.shape
        index = torch.arange(steps * s).reshape(steps, s).tolist()
        return [Sampled((hats @ self.values.flatten(1)).reshape(-1, DIM, DIM), index)]

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return torch.tanh(x @ w[0].T)

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        if not self.by_hand:
            return super().push(x, w, out)
        torch.tanh(x @ w[0].T, out=out)
        return (out,)

    def pull(
        self,
        x: Tensor,
        saved: Saved,
        w: Sequence[Tensor],
        p: Tensor,
        scale: float,
        into: Sequence[Tensor | None],
        out: Tensor,
    ) -> None:
        if not self.by_hand:
            return super().pull(x, saved, w, p, scale, into, out)
        p *= scale * (1 - saved[0] ** 2)
        if into[0] is not None:
            into[0] += p.flatten(0, -2).T @ x.flatten(0, -2)
        torch.matmul(p, w[0], out=out)


def plain(t: Tensor, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return torch.sin(x @ w.T) * (1 + t * c)


def states(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid(learned: bool = True) -> Tensor:
    """Unequal steps, one of them zero."""
    return torch.tensor([0.0, 0.3, 0.3, 0.45, 1.0], dtype=torch.float64, requires_grad=learned)


def problem(
    kind: str,
) -> tuple[VectorField | Callable[..., Tensor], list[Tensor], tuple[Tensor, ...]]:
    """A field, what of it needs a gradient, and `parameters`."""
    if kind == "function":
        w, c = 0.7 * torch.randn(DIM, DIM, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
        given = w.requires_grad_(), c.requires_grad_()
        return plain, list(given), given
    field = Perceptron() if kind == "module" else Knots(by_hand=kind == "by hand")
    return field, [p for p in field.parameters() if p.requires_grad], ()


def loss(x: Tensor) -> Tensor:
    """Not symmetric in states, components or times."""
    weights = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
    return (weights * x).sum() + (x**2).mean()


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_gradients_of_all_schemes_agree_to_rounding(scheme: str) -> None:
    for kind, trajectory in (("function", True), ("by hand", False)):
        field, weights, parameters = problem(kind)
        inputs = [states().requires_grad_(), grid(), *weights]

        def gradients(field=field, parameters=parameters, inputs=inputs, trajectory=trajectory, **how):  # type: ignore[no-untyped-def]
            x = integrate(
                field, inputs[0], inputs[1], scheme, parameters=parameters, trajectory=trajectory, **how
            )
            return x.detach(), torch.autograd.grad(loss(x), inputs)

        value, expected = gradients(gradient="autograd")
        assert all(float(g.abs().max()) > 1e-3 for g in expected)
        for how in WAYS.values():
            again, found = gradients(**how)
            torch.testing.assert_close(again, value, rtol=1e-14, atol=1e-14)
            close(found, expected, 1e-12)


@pytest.mark.parametrize("kind", ["function", "module", "tape", "by hand"])
@pytest.mark.parametrize("scheme", ["euler", "dormand_prince", "stoermer_verlet", "gauss2"])
def test_all_kinds_of_fields(kind: str, scheme: str) -> None:
    field, weights, parameters = problem(kind)
    inputs = [states().requires_grad_(), grid(), *weights]

    def gradients(**how: str) -> Sequence[Tensor]:
        x = integrate(field, inputs[0], inputs[1], scheme, parameters=parameters, trajectory=True, **how)  # type: ignore[arg-type]
        assert x.shape == (5, *inputs[0].shape)
        torch.testing.assert_close(x[1], x[2], rtol=0, atol=0)  # the step of zero
        return torch.autograd.grad(loss(x), inputs)

    expected = gradients(gradient="autograd")
    for how in WAYS.values():
        close(gradients(**how), expected, 1e-12)


@pytest.mark.parametrize("scheme", ["kutta4", "lobatto"])
def test_only_some_inputs_need_a_gradient(scheme: str) -> None:
    field, weights, _ = problem("by hand")
    everything = [states().requires_grad_(), grid(), *weights]
    full = torch.autograd.grad(loss(integrate(field, everything[0], everything[1], scheme)), everything)
    for chosen in itertools.chain(*(itertools.combinations(range(3), n) for n in (1, 2))):
        for i, v in enumerate(everything):
            v.requires_grad_(i in chosen)
        x = integrate(field, everything[0], everything[1], scheme)
        close(torch.autograd.grad(loss(x), [everything[i] for i in chosen]), [full[i] for i in chosen], 1e-12)


def test_one_state_several_batch_dimensions_and_time_backwards() -> None:
    """Each state is integrated by itself, so a batch is its states one by one."""
    field, _, parameters = problem("function")
    x0, times = torch.randn(2, 3, DIM, dtype=torch.float64), grid(learned=False).flip(0)
    with torch.no_grad():
        batch = integrate(field, x0, times, "gauss2", parameters=parameters)
        single = [integrate(field, x, times, "gauss2", parameters=parameters) for x in x0.flatten(0, 1)]
    torch.testing.assert_close(batch.flatten(0, 1), torch.stack(single), rtol=1e-13, atol=1e-13)
    x0.requires_grad_()
    x = integrate(field, x0, times, "kutta3", parameters=parameters)
    y = integrate(field, x0, times, "kutta3", parameters=parameters, gradient="autograd")
    close(torch.autograd.grad(loss(x), x0), torch.autograd.grad(loss(y), x0), 1e-13)


# ---- the symplectic partner -------------------------------------------------------------------------------


def partner_gradient(
    f: Callable[..., Tensor], w: Tensor, x0: Tensor, times: Tensor, scheme: Tableau, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Costate at the start and dJ/dw, by the definition of the partner scheme with dense linear algebra:

        p_(n+1) = p_n - h sum_i b_i J_i^T P_i,    P_i = p_n - h sum_j a~_ij J_j^T P_j,

    J_i = d_x f at the stages of the direct run, whose equations are solved by fixed-point iteration.
    """
    partner, dim, s = scheme.partner(), len(x0), scheme.stages
    A, b, A_partner = (torch.from_numpy(np.array(v)) for v in (scheme.A, scheme.b, partner.A))
    kept, x = [], x0
    for t, h in zip(times[:-1], times.diff(), strict=True):
        K = torch.zeros(s, dim, dtype=x.dtype)
        for _ in range(200):
            X = x + h * A @ K
            K = torch.stack([f(t + c * h, X[i], w) for i, c in enumerate(scheme.c)])
        kept.append((t, h, X))
        x = x + h * b @ K
    p, gradient = end, torch.zeros_like(w)
    for t, h, X in reversed(kept):
        nodes = [t + c * h for c in scheme.c]
        by_x, by_w = zip(
            *(
                torch.autograd.functional.jacobian(lambda x, w, t=t: f(t, x, w), (X[i], w))
                for i, t in enumerate(nodes)
            ),
            strict=True,
        )
        # Unknowns (p_n, P_1, ..., P_s).
        system, rhs = torch.eye((s + 1) * dim, dtype=x.dtype), torch.zeros((s + 1) * dim, dtype=x.dtype)
        rhs[:dim] = p
        for j in range(s):
            column = slice((j + 1) * dim, (j + 2) * dim)
            system[:dim, column] = -h * b[j] * by_x[j].T
            for i in range(s):
                row = slice((i + 1) * dim, (i + 2) * dim)
                system[row, :dim] = -torch.eye(dim, dtype=x.dtype)
                system[row, column] += h * A_partner[i, j] * by_x[j].T
        p, *P = torch.linalg.solve(system, rhs).split(dim)
        for i in range(s):
            gradient = gradient + h * b[i] * torch.einsum("i,i...->...", P[i], by_w[i])
    return p, gradient


WITH_PARTNER = [name for name, t in TABLEAUX.items() if not t.partitioned and (t.b != 0).all()]


@pytest.mark.parametrize("scheme", [*WITH_PARTNER, "chebyshev4"])
def test_the_adjoint_is_the_symplectic_partner(scheme: str) -> None:
    w = (0.7 * torch.randn(DIM, DIM, dtype=torch.float64)).requires_grad_()
    c = torch.tensor(0.4, dtype=torch.float64)
    x0, times = states()[0].requires_grad_(), grid(learned=False)
    x = integrate(plain, x0, times, scheme, parameters=(w, c))
    found = torch.autograd.grad(loss(x), [x0, w])
    y = x.detach().requires_grad_()
    (end,) = torch.autograd.grad(loss(y), y)
    expected = partner_gradient(
        lambda t, x, w: plain(t, x, w, c), w.detach(), x0.detach(), times, tableau(scheme), end
    )
    close(found, expected, 1e-12)


def test_backsolve_is_what_torchdiffeq_does_and_not_the_gradient() -> None:
    """Euler and the 3/8 rule on its fixed grids, with its adjoint."""
    from torchdiffeq import odeint_adjoint

    rule = Tableau(
        "three eighths",
        [[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    )
    field = Perceptron()
    inputs = [states().requires_grad_(), *(p for p in field.parameters() if p.requires_grad)]
    times = torch.linspace(0, 2, 6, dtype=torch.float64)
    for theirs, ours in (("euler", tableau("euler")), ("rk4", rule)):
        x = odeint_adjoint(field, inputs[0], times[[0, -1]], method=theirs, options={"step_size": 0.4})[-1]
        expected = torch.autograd.grad(loss(x), inputs)
        found = torch.autograd.grad(loss(backsolve(field, inputs[0], times, ours)), inputs)
        close(found, expected, 1e-13)
        exact = torch.autograd.grad(loss(integrate(field, inputs[0], times, ours)), inputs)
        assert float((found[0] - exact[0]).abs().max()) > 1e-6
    with pytest.raises(GliodeError, match="gauss2: backsolve is for explicit"):
        backsolve(field, inputs[0], times, "gauss2")


def test_stoermer_verlet_is_symplectic_for_a_separable_problem() -> None:
    def pendulums(t: Tensor, x: Tensor) -> Tensor:
        q, p = x.chunk(2, -1)
        return torch.cat([p + p**3 / 5, -torch.sin(q) - 0.3 * q.flip(-1)], -1)

    times = torch.linspace(0, 2, 6, dtype=torch.float64)
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64).kron(torch.eye(2, dtype=torch.float64))

    def defect(scheme: str) -> float:
        M = torch.autograd.functional.jacobian(lambda x: integrate(pendulums, x, times, scheme), states()[0])
        return float((M.T @ J @ M - J).abs().max())

    assert defect("stoermer_verlet") < 1e-13
    assert defect("kutta4") > 1e-5


# ---- derivatives of every kind ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["heun", "stoermer_verlet"])
@pytest.mark.parametrize("gradient", ["adjoint", "autograd", "checkpointed"])
def test_first_and_second_derivatives_in_both_modes(scheme: str, gradient: str) -> None:
    w = (0.7 * torch.randn(2, 2, dtype=torch.float64)).requires_grad_()
    x0 = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 0.4, 0.4], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.4, dtype=torch.float64)

    def run(x0: Tensor, times: Tensor, w: Tensor) -> Tensor:
        return integrate(plain, x0, times, scheme, gradient=gradient, parameters=(w, c), trajectory=True)

    assert gradcheck(run, (x0, times, w), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, (x0, times, w), check_fwd_over_rev=True, fast_mode=True)


def test_forward_mode_is_the_transpose_of_the_adjoint() -> None:
    """<J d, y> = <d, J^T y>, without a gradient in sight of the forward pass."""
    field, _, _ = problem("module")
    x0, y = states(), states(2)
    d = states(3)
    for scheme in SCHEMES:
        with torch.no_grad(), forward_ad.dual_level():
            out = integrate(field, forward_ad.make_dual(x0, d), grid(learned=False), scheme)
            moved = forward_ad.unpack_dual(out).tangent
        leaf = x0.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(integrate(field, leaf, grid(learned=False), scheme), leaf, y)
        torch.testing.assert_close((moved * y).sum(), (d * pulled).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("scheme", ["heun", "midpoint"])
def test_backward_twice(how: str, scheme: str) -> None:
    field, weights, _ = problem("by hand")
    inputs = [states().requires_grad_(), *weights]
    x = integrate(field, inputs[0], grid(learned=False), scheme, trajectory=True, **WAYS[how])  # type: ignore[arg-type]
    first = torch.autograd.grad(loss(x), inputs, retain_graph=True)
    close(torch.autograd.grad(loss(x), inputs, retain_graph=True), first, 1e-15)
    half = torch.autograd.grad(x[-1].sum(), inputs, retain_graph=True)
    rest = torch.autograd.grad(loss(x) - x[-1].sum(), inputs)
    close([a + b for a, b in zip(half, rest, strict=True)], first, 1e-12)


def test_what_is_returned_is_nobodys_workspace() -> None:
    """Writing into a result does not change the gradient of what it came from."""
    field, weights, _ = problem("by hand")
    x0 = states().requires_grad_()
    expected = torch.autograd.grad(loss(integrate(field, x0, grid(False), trajectory=True)), [x0, *weights])
    x = integrate(field, x0, grid(False), trajectory=True)
    value = loss(x.clone())
    x.detach().zero_()
    close(torch.autograd.grad(value, [x0, *weights]), expected, 1e-14)


@pytest.mark.parametrize("gradient", ["adjoint", "autograd", "checkpointed"])
def test_float32_agrees_to_float32(gradient: str) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(4)
        field = Perceptron(dtype=torch.float64).to(dtype)
        x0 = states().to(dtype).requires_grad_()
        times = grid().detach().to(dtype).requires_grad_()
        for scheme in ("kutta4", "gauss2", "stoermer_verlet"):
            x = integrate(field, x0, times, scheme, gradient=gradient)
            found = torch.autograd.grad(loss(x), [x0, times, field.inner.weight])
            assert all(v.dtype == dtype for v in (x, *found))
            results.append([v.detach().double() for v in (x, *found)])
    for exact, single in zip(results[:3], results[3:], strict=True):
        close(single, exact, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["kutta4", "gauss2", "stoermer_verlet"])
def test_the_gpu_gives_the_same(scheme: str) -> None:
    field, times = Perceptron(), grid()
    results = []
    for device in ("cpu", "cuda"):
        field = field.to(device)
        x0, t = (v.detach().to(device).requires_grad_() for v in (states(), times))
        for how in ({"gradient": "autograd"}, *WAYS.values()):
            x = integrate(field, x0, t, scheme, **how)  # type: ignore[arg-type]
            found = torch.autograd.grad(loss(x.cpu()), [x0, t, field.inner.weight])
            results.append([v.detach().cpu() for v in (x, *found)])
    for other in results[1:]:
        close(other, results[0], 1e-11)


def test_a_float64_grid_leaves_float32_states_as_they_are() -> None:
    field, x0, times = Perceptron(dtype=torch.float32), states(dtype=torch.float32).requires_grad_(), grid()
    for scheme in ("heun", "midpoint"):
        for how in ({"gradient": "autograd"}, *WAYS.values()):
            x = integrate(field, x0, times, scheme, **how)  # type: ignore[arg-type]
            found = torch.autograd.grad(loss(x), [x0, times])
            assert [v.dtype for v in (x, *found)] == [torch.float32, torch.float32, torch.float64]


# ---- noise ------------------------------------------------------------------------------------------------


def seeded(std: float, where: str, seed: int = 5) -> Noise:
    return Noise(std, where, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("where", ["state", "rhs"])
@pytest.mark.parametrize("scheme", ["kutta4", "gauss2"])
def test_noise_follows_its_seed_and_all_gradients_agree(where: str, scheme: str) -> None:
    field, weights, parameters = problem("by hand")
    inputs = [states().requires_grad_(), grid(), *weights]

    def run(seed: int = 5, how: dict[str, str] | None = None) -> Tensor:
        return integrate(
            field,
            inputs[0],
            inputs[1],
            scheme,
            parameters=parameters,
            trajectory=True,
            noise=seeded(0.3, where, seed),
            **(how or {}),  # type: ignore[arg-type]
        )

    quiet = integrate(field, inputs[0], inputs[1], scheme, trajectory=True)
    x = run(how={"gradient": "autograd"})
    assert float((x - quiet).detach()[-1].abs().max()) > 0.05
    assert float((x - run(seed=6)).detach().abs().max()) > 0.05
    expected = torch.autograd.grad(loss(x), inputs)
    for how in WAYS.values():
        y = run(how=how)
        torch.testing.assert_close(y, x, rtol=1e-13, atol=1e-13)
        close(torch.autograd.grad(loss(y), inputs), expected, 1e-12)


@pytest.mark.parametrize("where", ["state", "rhs"])
def test_the_gradient_under_noise_is_that_of_the_noisy_run(where: str) -> None:
    w = (0.7 * torch.randn(2, 2, dtype=torch.float64)).requires_grad_()
    x0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.4, dtype=torch.float64)

    def run(x0: Tensor, times: Tensor, w: Tensor) -> Tensor:
        return integrate(plain, x0, times, "heun", parameters=(w, c), noise=seeded(0.2, where))

    times = torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x0, times, w), check_forward_ad=True, fast_mode=True)


def test_the_size_of_the_noise() -> None:
    """f = 0: sums of N numbers of std s in the state, of h s in the right-hand side; new ones each step."""
    x0, times = torch.zeros(20_000, 1, dtype=torch.float64), torch.linspace(0, 2, 5, dtype=torch.float64)
    still = lambda t, x: torch.zeros_like(x)  # noqa: E731
    for where, unit in (("state", 1.0), ("rhs", 0.5)):
        x = integrate(still, x0, times, "kutta4", noise=seeded(0.1, where), trajectory=True)
        for n in range(5):
            assert float(x[n].std()) == pytest.approx(0.1 * unit * math.sqrt(n), rel=0.03)
            assert abs(float(x[n].mean())) < 0.005
        kicks = x.diff(dim=0)[..., 0]
        assert float((torch.corrcoef(kicks) - torch.eye(4)).abs().max()) < 0.03
    torch.testing.assert_close(integrate(still, x0, times, noise=Noise(0.0)), x0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1.0,), "std must be"), ((math.nan,), "std must be"), ((1.0, "weights"), "give 'state' or 'rhs'")],
)
def test_bad_noise(arguments: tuple[float, str], message: str) -> None:
    with pytest.raises(GliodeError, match=f"noise: .*{message}"):
        Noise(*arguments)


# ---- bad input --------------------------------------------------------------------------------------------


def test_hidden_tensors_are_found() -> None:
    """A gradient that would be lost is an error; the tape of all operations finds it itself."""
    w = (0.7 * torch.randn(DIM, DIM, dtype=torch.float64)).requires_grad_()
    x0, times = states().requires_grad_(), grid(learned=False)

    def hidden(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w.T)

    with pytest.raises(GliodeError, match="pass them as parameters"):
        integrate(hidden, x0, times)
    (found,) = torch.autograd.grad(loss(integrate(hidden, x0, times, gradient="autograd")), w)
    shown = integrate(lambda t, x, w: torch.tanh(x @ w.T), x0, times, parameters=(w,))
    close([found], torch.autograd.grad(loss(shown), w), 1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "rk4"}, "scheme 'rk4' is not one of"),
        ({"gradient": "tape"}, "gradient 'tape' is not one of adjoint"),
        ({"store": "all"}, "store 'all'"),
        ({"times": torch.tensor([0.0])}, "times: give at least two"),
        ({"times": torch.tensor([[0.0, 1.0]])}, "times: .*one dimension"),
        ({"times": torch.tensor([0.0, math.nan])}, "times: .*finite"),
        ({"x0": torch.zeros(2, 3), "scheme": "lobatto"}, "lobatto: the state .* even dimension, not 3"),
        ({"field": Knots(True), "parameters": (torch.zeros(1),)}, "parameters: a VectorField has its own"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "field": lambda t, x, *w: x,
        "x0": torch.zeros(2, 4),
        "times": torch.tensor([0.0, 1.0]),
    }
    with pytest.raises(GliodeError, match=message):
        integrate(**(good | change))  # type: ignore[arg-type]


def test_layers_of_another_number_than_the_steps() -> None:
    class Layers(Knots):
        def sample(self, stages: Tensor) -> Sequence[Sampled]:
            return [Sampled.stepwise(self.values, stages, "weights")]

    field = Layers(by_hand=False)
    x = integrate(field, states(), torch.linspace(0, 1, 4, dtype=torch.float64), "euler")
    by_hand = states()
    for W in field.values:
        by_hand = by_hand + torch.tanh(by_hand @ W.T) / 3
    torch.testing.assert_close(x, by_hand, rtol=1e-14, atol=1e-14)
    with pytest.raises(GliodeError, match="3 layers of weights for 4 steps"):
        integrate(field, states(), grid(False), "euler")
