"""Lipschitz constants: lower bound <= true constant <= upper bound, and where they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from inverse.sensitivity import (
    certified_flow,
    certified_lipschitz,
    certified_radius,
    local_lipschitz,
    minimal_attack,
)
from solvers.errors import GliodeError
from solvers.node.fields import GradientFlow, ODENet, Standalone, TwoLayer
from solvers.node.models import Augment, Components, Net, Node
from solvers.ode.integrate import integrate
from solvers.ode.tableaux import TABLEAUX
from tests.inverse.networks import ResNet, numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_local_constants_are_the_spectral_norms_of_the_samples(dtype: torch.dtype) -> None:
    F, x = ResNet(24, 3, 30, dtype), 2 * numbers(6, 24).to(dtype)
    exact = torch.stack([torch.linalg.matrix_norm(jacobian(F, v), 2) for v in x])
    found = local_lipschitz(F, x)
    torch.testing.assert_close(found, exact, rtol=1e-3 if dtype == torch.float32 else 1e-5, atol=0)
    one = local_lipschitz(F, x, iterations=1)
    assert bool((one < exact).all())
    rounding = 1 + 100 * torch.finfo(dtype).eps
    assert bool((found <= exact * rounding).all())
    assert not local_lipschitz(lambda x: torch.relu(x - 100), x).any()
    few = local_lipschitz(lambda x: F(x)[:, :2], x)  # of rank 2: done after two steps
    exact = torch.stack([torch.linalg.matrix_norm(jacobian(lambda x: F(x)[:2], v), 2) for v in x])
    torch.testing.assert_close(few, exact, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)


def test_lower_bound_true_constant_upper_bound() -> None:
    """Two ReLU layers of the plane without biases: linear in sectors, whose norms give the true constant."""
    W1, W2 = numbers(6, 2), numbers(3, 6, seed=1)
    net: Any = nn.Sequential(nn.Linear(2, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(W1)
        net[2].weight.copy_(W2)
    edges = torch.atan2(-W1[:, 0], W1[:, 1])  # where w . x = 0
    edges = torch.cat([edges, edges + math.pi]).remainder(2 * math.pi).sort().values
    middle = (edges + torch.cat([edges[1:], edges[:1] + 2 * math.pi])) / 2
    x = torch.stack([middle.cos(), middle.sin()], 1)
    norms = torch.stack([torch.linalg.matrix_norm(W2 @ ((W1 @ v > 0).double()[:, None] * W1), 2) for v in x])
    lower, true, upper = local_lipschitz(net, x), float(norms.max()), certified_lipschitz(net)
    torch.testing.assert_close(lower, norms)
    assert true < upper == pytest.approx(float(torch.linalg.svdvals(W1)[0] * torch.linalg.svdvals(W2)[0]))
    assert float(local_lipschitz(net, x[:3]).max()) <= true * (1 + 1e-12)
    pairs = torch.randn(2, 5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ratios = (net(pairs[0]) - net(pairs[1])).norm(dim=1) / (pairs[0] - pairs[1]).norm(dim=1)
    assert float(ratios.max()) <= true * (1 + 1e-12)


def test_the_upper_bound_is_the_constant_of_a_linear_layer() -> None:
    layer = nn.Linear(7, 5).double()
    exact = float(torch.linalg.svdvals(layer.weight.detach())[0])
    assert exact <= certified_lipschitz(layer) <= exact * (1 + 1e-12)
    torch.testing.assert_close(local_lipschitz(layer, numbers(3, 7)), torch.full((3,), exact).double())


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(3.0), nn.LeakyReLU(-1.5), nn.ELU(2.0), nn.Identity()],
)
def test_slopes_of_the_activations(layer: nn.Module) -> None:
    z = torch.linspace(-6, 6, 100001, dtype=torch.float64)
    largest = float((layer(z).diff() / z.diff()).abs().max())
    assert largest <= certified_lipschitz(layer) * (1 + 1e-9) and largest > 0.99 * certified_lipschitz(layer)


@pytest.mark.parametrize(
    "scheme", ["euler", "heun", "kutta3", "kutta4", "ssp3", "dormand_prince", "chebyshev5"]
)
def test_the_bound_of_a_flow_with_positive_coefficients_is_attained(scheme: str) -> None:
    """x' = L x grows by the stability polynomial, which is the bound where no coefficient is negative."""
    times = torch.tensor([0.0, 0.1, 0.4, 0.5], dtype=torch.float64)
    bound = certified_flow(2.0, times, scheme)
    grown = float(integrate(lambda t, x: 2 * x, torch.ones(1).double(), times, scheme))
    tableau = TABLEAUX.get(scheme)
    if tableau is not None and bool((tableau.A >= 0).all()) and bool((tableau.b >= 0).all()):
        assert bound == pytest.approx(grown, rel=1e-12)
    assert bound >= grown * (1 - 1e-12)
    if scheme == "kutta3":  # a_31 = -1: the stages' bounds are 1, 1 + z/2 and 1 + z + 2z (1 + z/2), z = h L
        product = 1.0
        for z in (0.2, 0.6, 0.2):
            product *= 1 + z / 6 + 2 * z / 3 * (1 + z / 2) + z / 6 * (1 + 3 * z + z**2)
        assert bound == pytest.approx(product)
    if scheme == "euler":
        assert bound == pytest.approx(1.2 * 1.6 * 1.2)
        depth = torch.tensor([1.0, 2.0, 3.0])
        assert certified_flow(depth, times) == pytest.approx(1.1 * 1.6 * 1.3)
        assert certified_flow(depth[:, None], times) == pytest.approx(1.1 * 1.6 * 1.3)
    assert certified_flow(2.0, times.flip(0), scheme) == pytest.approx(bound)


FIELDS: dict[str, Callable[[], Any]] = {
    "standalone": lambda: Standalone(3, knots=4, duration=1.5),
    "odenet": lambda: ODENet(3, kind="steps", knots=6, duration=1.5),
    "gradient_flow": lambda: GradientFlow(3, 5, "softplus", knots=4, duration=1.5),
    "two_layer": lambda: TwoLayer(3, 4, "sigmoid", kind="linear", knots=4, duration=1.5),
}


@pytest.mark.parametrize("scheme", ["euler", "heun", "kutta3", "kutta4"])
@pytest.mark.parametrize("name", FIELDS)
def test_no_sample_exceeds_the_certified_flow(name: str, scheme: str) -> None:
    field = FIELDS[name]()
    torch.manual_seed(0)
    field.reset(gain=2.5 if name == "gradient_flow" else 0.8, rough=0.4)
    node = Node(field, 1.5, 6, scheme).double()
    upper = certified_lipschitz(nn.Sequential(Augment(1), node, Components(2)))
    assert upper == certified_flow(field, node.times(), scheme)
    x = torch.cat([2 * numbers(200, 3), torch.zeros(1, 3)])
    lower = float(local_lipschitz(node, x).max())
    assert lower < upper and (lower > 1 or name == "gradient_flow")
    if scheme != "euler":
        return
    product = 1.0
    for n in range(6):  # the knots are 0, 0.5, 1, 1.5, the steps 0.25
        left, share = divmod(n, 2)
        w = {
            key: field.weights(key).values.detach()[n]
            if name == "odenet"
            else (1 - share / 2) * field.weights(key).values.detach()[left]
            + share / 2 * field.weights(key).values.detach()[left + 1]
            for key in field.names
        }
        size = {
            key: float(torch.linalg.svdvals(W)[0]) if W.ndim == 2 else float(W.norm()) for key, W in w.items()
        }
        product *= 1 + 0.25 * {
            "standalone": lambda s: s["W"],
            "odenet": lambda s: s["alpha"] * s["K"],
            "gradient_flow": lambda s: s["K"] ** 2,
            "two_layer": lambda s: s["W1"] * s["W2"] / 4,
        }[name](size)
    assert upper == pytest.approx(product, rel=1e-9)


def test_a_gradient_flow_in_short_steps_is_certified_non_expansive() -> None:
    for seed in range(3):
        field = GradientFlow(5, 7, "relu", kind="steps", knots=8)
        field.reset(rough=0.5, generator=torch.Generator().manual_seed(seed))
        node = Node(field, steps=8, scheme="heun").double()
        K = field.weights("K").values
        largest = float(torch.linalg.matrix_norm(K, 2).max()) ** 2
        with torch.no_grad():
            K.mul_((2 * 8 / largest) ** 0.5 * 0.999)  # h ||K||^2 / 2 = 0.998, the radius is 1
        assert certified_flow(field, node.times(), "heun") == 1.0
        assert float(local_lipschitz(node, 3 * numbers(100, 5)).max()) <= 1 + 1e-12
        with torch.no_grad():
            K.mul_(1.01)
        assert certified_flow(field, node.times(), "heun") > 1.5
        assert certified_flow(field, node.times().flip(0), "heun") > 1.5


def test_a_residual_network_and_a_plain_one() -> None:
    net = ResNet(6, 3, 2)
    blocks = torch.tensor([certified_lipschitz(block) for block in net.blocks])  # type: ignore[arg-type]
    upper = certified_flow(blocks, torch.arange(4.0)) * certified_lipschitz(net.head)
    whole = nn.Sequential(nn.Identity(), net)
    assert certified_lipschitz(whole, bounds={net: upper}) == upper
    assert float(local_lipschitz(net, numbers(100, 6)).max()) <= upper
    plain = Net(6, layers=4, sigma="sigmoid").double()
    with torch.no_grad():
        plain.K.values.copy_(numbers(4, 6, 6))
    exact = math.prod(float(torch.linalg.svdvals(K)[0]) / 4 for K in plain.K.values.detach())
    assert certified_lipschitz(plain) == pytest.approx(exact)
    assert float(local_lipschitz(plain, numbers(50, 6)).max()) <= exact


def test_no_attack_gets_within_the_certified_radius() -> None:
    net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4)).double()
    x = numbers(30, 8)
    radius = certified_radius(net(x), certified_lipschitz(net))
    assert bool((radius <= minimal_attack(net, x).norms).all()) and bool((radius > 0).all())
    # Sharp for two scores +- w . x: the distance to the hyperplane itself.
    w = numbers(8, seed=1)
    two = torch.stack([w, -w]) / math.sqrt(2)
    torch.testing.assert_close(certified_radius(x @ two.mT, float(w.norm())), (x @ w).abs() / w.norm())


def test_bounds_refuse() -> None:
    times = torch.linspace(0, 1, 4)
    for call, message in [
        (lambda: certified_lipschitz(nn.Conv2d(1, 1, 3)), "no bound is known for Conv2d"),
        (lambda: certified_lipschitz(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))), "for Softmax"),
        (lambda: certified_flow(1.0, times, "midpoint"), "take an explicit scheme"),
        (lambda: certified_flow(1.0, times[:1]), "two or more"),
        (lambda: certified_flow(-1.0, times), "not negative"),
        (lambda: certified_flow(torch.ones(2), times), r"shape \(2,\) for 3 steps of 1 stages"),
        (lambda: certified_radius(torch.ones(3), 1.0), "give \\(B, classes\\)"),
        (lambda: certified_radius(torch.ones(3, 2), 0.0), "positive bound"),
        (lambda: local_lipschitz(torch.sin, torch.ones(3)), "give a map of batches"),
        (lambda: local_lipschitz(torch.sin, torch.ones(3, 2), iterations=0), "iterations: 0"),
    ]:
        with pytest.raises(GliodeError, match=message):
            call()
