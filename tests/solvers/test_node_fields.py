"""Fields that are networks: their equations, and their gradients by hand against the tape and differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from solvers.errors import GliodeError
from solvers.node.activations import ACTIVATIONS, Activation, activation
from solvers.node.fields import GradientFlow, ODENet, Standalone, TwoLayer
from solvers.node.weights import DepthWeights
from solvers.ode.fields import VectorField
from solvers.ode.integrate import integrate

DIM, WIDTH, STEPS = 3, 5, 4
SWISH = Activation.custom(
    "swish",
    lambda z: z * torch.sigmoid(z),
    lambda z: torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z))),
    (-0.1, 1.1),
)
SIGMAS: dict[str, str | Activation] = {**{name: name for name in ACTIVATIONS}, "swish": SWISH}
FIELDS: dict[str, Callable[..., VectorField]] = {
    "Standalone": lambda *how, **more: Standalone(DIM, *how, **more),
    "ODENet": lambda *how, **more: ODENet(DIM, *how, **more),
    "GradientFlow": lambda *how, **more: GradientFlow(DIM, WIDTH, *how, **more),
    "TwoLayer": lambda *how, **more: TwoLayer(DIM, WIDTH, *how, **more),
}
SCALE = -0.7  # of the products that `pull` adds
SHAPES = [(DIM,), (5, DIM), (2, 4, DIM)]
KINDS = [("linear", 3), ("cubic", 4), ("steps", STEPS), ("constant", 1)]


def made(name: str, sigma: str | Activation = "tanh", kind: str = "linear", knots: int = 3) -> VectorField:
    """A field with random weights, in float64."""
    field = FIELDS[name](sigma, kind=kind, knots=knots).double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_()
    return field


def rows(field: VectorField) -> list[Tensor]:
    """The weights at time 0."""
    return [
        w.table[0].detach().requires_grad_() for w in field.sample(torch.zeros(1, 1, dtype=torch.float64))
    ]


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """Relative to the largest entry of each."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


# ---- activations -------------------------------------------------------------------------------------------


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "softplus": lambda z: np.logaddexp(0, z),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "identity": lambda z: z,
    "swish": lambda z: z / (1 + np.exp(-z)),
}


@pytest.mark.parametrize("name", SIGMAS)
def test_an_activation_is_its_formula_with_its_derivative_and_slopes(name: str) -> None:
    sigma = activation(SIGMAS[name])
    z = torch.linspace(-6, 6, 402, dtype=torch.float64)
    value = sigma.value(z)
    np.testing.assert_allclose(value.numpy(), VALUES[name](z.numpy()), rtol=1e-12, atol=1e-12)
    saved = value if sigma.from_value else z
    slope = sigma.pullback(torch.full_like(z, 3.0), saved.clone()) / 3
    e = 1e-5
    difference = (VALUES[name](z.numpy() + e) - VALUES[name](z.numpy() - e)) / (2 * e)
    np.testing.assert_allclose(slope.numpy(), difference, atol=1e-9)
    low, high = sigma.slopes
    assert low - 1e-12 <= float(slope.min()) and float(slope.max()) <= high + 1e-12
    assert float(slope.max()) > high - 0.15 and float(slope.min()) < low + 0.15, "the bounds are loose"
    if sigma.value_ is not None:
        again = z.clone()
        sigma.value_(again)
        assert torch.equal(again, value) and sigma.from_value


def test_a_custom_activation_is_checked() -> None:
    def square(z: Tensor) -> Tensor:
        return z * z

    right = Activation.custom("square", square, lambda z: 2 * z, (-20, 20))
    assert activation(right) is right
    with pytest.raises(GliodeError, match="square: the derivative is not that of the value"):
        Activation.custom("square", square, lambda z: 2.001 * z, (-30, 30))
    with pytest.raises(GliodeError, match="square: the derivative is not"):
        Activation.custom("square", square, lambda z: torch.tensor(2.0), (-20, 20))
    for slopes in ((-19.0, 20.0), (-20.0, 19.0)):
        with pytest.raises(GliodeError, match="they reach from -20 to 20"):
            Activation.custom("square", square, lambda z: 2 * z, slopes)
    with pytest.raises(GliodeError, match=r"'swisch' is not one of tanh, .*Activation\.custom"):
        Standalone(DIM, "swisch")


def test_a_custom_tanh_does_what_the_built_in_one_does() -> None:
    custom = Activation.custom("mine", torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, (0, 1))
    for name in FIELDS:
        ours, built_in = made(name, custom), made(name)
        built_in.load_state_dict(ours.state_dict())
        x = torch.randn(5, DIM, dtype=torch.float64)
        times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        results = []
        for field in (ours, built_in):
            y = integrate(field, x, times)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(field.parameters()))])
        close(results[0], results[1])


# ---- fields ------------------------------------------------------------------------------------------------


def test_the_fields_are_their_equations() -> None:
    x = np.random.default_rng(0).standard_normal((6, DIM))

    def rhs(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
        field = made(name, "sigmoid")
        w = rows(field)
        return field.rhs(torch.from_numpy(x), *w).detach().numpy(), [v.detach().numpy() for v in w]

    def sigma(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    found, (W, b) = rhs("Standalone")
    np.testing.assert_allclose(found, [sigma(W @ v + b) for v in x], rtol=1e-13)
    found, (K, b, alpha) = rhs("ODENet")
    np.testing.assert_allclose(found, [alpha * sigma(K @ v + b) for v in x], rtol=1e-13)
    found, (K, b) = rhs("GradientFlow")
    assert K.shape == (WIDTH, DIM)
    np.testing.assert_allclose(found, [-K.T @ sigma(K @ v + b) for v in x], rtol=1e-13)
    found, (W1, b1, W2, b2) = rhs("TwoLayer")
    np.testing.assert_allclose(found, [W2 @ sigma(W1 @ v + b1) + b2 for v in x], rtol=1e-13)


def test_a_gradient_flow_descends_its_energy() -> None:
    field = made("GradientFlow")
    K, b = rows(field)
    x = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)
    energy = torch.log(torch.cosh(x @ K.T + b)).sum()  # its derivative is tanh
    close([field.rhs(x, K, b)], [-torch.autograd.grad(energy, x)[0]])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_push_and_pull_are_the_right_hand_side_and_its_transpose(name: str, sigma: str) -> None:
    field = made(name, SIGMAS[sigma])
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        w, p = rows(field), torch.randn(shape, dtype=torch.float64)
        expected = field.rhs(x, *w)
        wanted = torch.autograd.grad(expected, (x, *w), SCALE * p)
        with torch.no_grad():
            out, state, bare = torch.empty(shape, dtype=torch.float64), x.detach(), [v.detach() for v in w]
            saved = field.push(state, bare, out)
            close([out], [expected.detach()], 1e-14)
            start = [torch.randn_like(v) for v in bare]
            into = [g.clone() for g in start]
            pulled = torch.empty_like(out)
            field.pull(state, saved, bare, p.clone(), SCALE, into, pulled)
            close([pulled, *(g - s for g, s in zip(into, start, strict=True))], wanted)
            saved, nothing = field.push(state, bare, out), [None] * len(bare)
            field.pull(state, saved, bare, p.clone(), SCALE, nothing, pulled)
            close([pulled], wanted[:1])
            for k in range(len(bare)):
                alone: list[Tensor | None] = [
                    torch.zeros_like(v) if j == k else None for j, v in enumerate(bare)
                ]
                field.pull(state, field.push(state, bare, out), bare, p.clone(), SCALE, alone, pulled)
                close([g for g in alone if g is not None], [wanted[1 + k]])


def gradients(
    field: VectorField, x: Tensor, p: Tensor, times: Tensor, scheme: str, gradient: str, store: str
) -> list[Tensor]:
    """The state at the end, and <p, its derivative> by the start and all weights."""
    y = integrate(field, x, times, scheme, gradient, store)
    return [y.detach(), *torch.autograd.grad(y, (x, *field.parameters()), p)]


@pytest.mark.parametrize("scheme", ["euler", "ssp3", "kutta4", "dormand_prince", "midpoint"])
@pytest.mark.parametrize("name", FIELDS)
def test_the_gradient_of_an_integration_is_autograd_s(name: str, scheme: str) -> None:
    """With all kinds of weights, activations and shapes of states, each at least once."""
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    cases = itertools.zip_longest(SIGMAS, KINDS, SHAPES)
    few = scheme == "midpoint"  # its solves take long
    for number, (sigma, depth, shape) in enumerate(itertools.islice(cases, 3 if few else None)):
        kind, knots = depth or KINDS[number % len(KINDS)]
        field = made(name, SIGMAS[sigma or "tanh"], kind, knots)
        x = torch.randn(shape or SHAPES[number % 3], dtype=torch.float64, requires_grad=True)
        cotangent = torch.randn_like(x)
        expected, *others = (
            gradients(field, x, cotangent, times, scheme, gradient, store)
            for gradient, store in (("autograd", "stages"), ("adjoint", "stages"), ("adjoint", "states"))
        )
        assert all(float(g.abs().max()) > 1e-6 for g in expected)
        for found in others:
            close(found, expected)


@pytest.mark.parametrize("name", FIELDS)
def test_derivatives_of_any_order_and_mode_pass_torch_s_checks(name: str) -> None:
    """By finite differences: the gradient, forward mode, reverse over reverse, forward over reverse."""
    field = FIELDS[name]("softplus", kind="linear", knots=2).double()
    names = [key for key, _ in field.named_parameters()]
    weights = [0.5 * torch.randn_like(p) for p in field.parameters()]
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, x: Tensor) -> Tensor:
            return integrate(self.field, x, times, "heun")

    block = Block()

    def f(x: Tensor, *w: Tensor) -> Tensor:
        values = {f"field.{key}": v for key, v in zip(names, w, strict=True)}
        out: Tensor = torch.func.functional_call(block, values, (x,))
        return out

    inputs = [v.requires_grad_() for v in (torch.randn(2, DIM, dtype=torch.float64), *weights)]
    assert gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", FIELDS)
def test_the_sensitivity_problem_is_the_transpose_of_the_adjoint_problem(name: str) -> None:
    field = made(name)
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    x = torch.randn(5, DIM, dtype=torch.float64)
    d, p = torch.randn_like(x), torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    y = integrate(field, leaf, times)
    (pulled,) = torch.autograd.grad(y, leaf, p)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(integrate(field, forward_ad.make_dual(x, d), times)).tangent
    assert math.isclose(float((pushed * p).sum()), float((pulled * d).sum()), rel_tol=1e-12)


def test_float32_gradients_are_those_of_float64_to_float32() -> None:
    for name in FIELDS:
        double = made(name)
        single = FIELDS[name]("tanh", kind="linear", knots=3)
        single.load_state_dict(double.state_dict())
        x = torch.randn(5, DIM)
        results = []
        for field, dtype in ((single, torch.float32), (double, torch.float64)):
            times = torch.linspace(0, 1, STEPS + 1, dtype=dtype)
            y = integrate(field, x.to(dtype), times)
            assert y.dtype == dtype
            gradients = torch.autograd.grad(y.square().sum(), list(field.parameters()))
            assert all(g.dtype == dtype for g in gradients)
            results.append([g.double() for g in (y, *gradients)])
        close(results[0], results[1], 1e-5)


def test_fixed_weights_get_no_gradient_and_the_others_keep_theirs() -> None:
    field = made("TwoLayer")
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    x = torch.randn(5, DIM, dtype=torch.float64)
    everything = torch.autograd.grad(integrate(field, x, times).square().sum(), list(field.parameters()))
    first = next(field.parameters()).requires_grad_(False)
    integrate(field, x, times).square().sum().backward()
    assert first.grad is None
    close([p.grad for p in field.parameters() if p.grad is not None], everything[1:])


def test_reset_starts_alike_at_all_depths_with_the_given_gain_and_seed() -> None:
    def started(name: str, seed: int, gain: float = 1.0, rough: float = 0.0) -> dict[str, Tensor]:
        field = FIELDS[name]("tanh", kind="linear", knots=4)
        field.reset(gain, rough, torch.Generator().manual_seed(seed))  # type: ignore[operator]
        return {key.removesuffix(".values"): p.detach() for key, p in field.named_parameters()}

    for name in FIELDS:
        smooth = started(name, 1)
        assert all(
            torch.equal(v, again) for v, again in zip(smooth.values(), started(name, 1).values(), strict=True)
        )
        for key, values in smooth.items():
            assert torch.equal(values, values[:1].expand_as(values))
            if key.startswith("b"):
                assert not values.any()
        assert not torch.equal(*(next(iter(started(name, seed).values())) for seed in (1, 2)))
        rough = started(name, 1, rough=0.5)
        assert float(next(iter(rough.values())).diff(dim=0).abs().min()) > 0
    assert torch.equal(started("ODENet", 1)["alpha"], torch.ones(4))
    wide = Standalone(100, kind="linear", knots=2)
    wide.reset(gain=3.0)
    assert math.isclose(float(wide.weights("W").values[0].std()), 3 / math.sqrt(100), rel_tol=0.03)
    assert isinstance(wide.weights("W"), DepthWeights)
