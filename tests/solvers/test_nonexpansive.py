"""Non-expansive flows: no pair moves apart, whatever the weights; what cannot promise it is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from inverse.sensitivity import certified_flow, certified_radius, pgd
from solvers.errors import GliodeError
from solvers.node.activations import Activation
from solvers.node.nonexpansive import Lipschitz1Linear, NonExpansive, limited, spectral_bound
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import TABLEAUX

EXPLICIT = ["euler", "heun", "kutta3", "kutta4", "ssp3"]
IMPLICIT = ["midpoint", "gauss2", "lobatto_iiia", "lobatto_iiib"]
D, WIDTH = 5, 8


def random_flow(scheme: str, sigma: str = "relu", kind: str = "linear", gain: float = 4.0) -> NonExpansive:
    """Weights far above the limit that differ at every stage."""
    knots = {"constant": 1, "steps": 6}.get(kind, 5)
    flow = NonExpansive(D, WIDTH, sigma, kind, knots, 1.5, 6, scheme).double()
    flow.field.reset(gain, rough=1.0)
    nn.init.normal_(flow.field.weights("b").values)
    return flow


def ratios(flow: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (flow(x) - flow(y)).norm(dim=1) / (x - y).norm(dim=1)


def largest_ratio(flow: nn.Module, dim: int = D, pairs: int = 200, steps: int = 25) -> float:
    """Of random pairs at distances from 0.01 to 10, and on the way of gradient ascent on the ratio."""
    x = 2 * torch.randn(pairs, dim, dtype=torch.float64)
    distance = 10 ** (1 - 3 * torch.rand(pairs, 1, dtype=torch.float64))
    y = x + distance * normalize(torch.randn_like(x))
    best = 0.0
    for _ in range(steps):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        found = ratios(flow, x, y)
        best = max(best, float(found.detach().max()))
        p, q = torch.autograd.grad(found.sum(), (x, y))
        x, y = x + 0.3 * normalize(p), y + 0.3 * normalize(q)
        y = x + distance * normalize(y - x)
    return best


# ---- The guarantee ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", ["relu", "tanh", "identity", "sigmoid"])
@pytest.mark.parametrize("scheme", EXPLICIT)
def test_no_pair_moves_apart(scheme: str, sigma: str) -> None:
    for kind in ("linear", "cubic", "steps"):
        assert largest_ratio(random_flow(scheme, sigma, kind)) <= 1 + 1e-12


@pytest.mark.parametrize("scheme", IMPLICIT)
def test_nor_by_an_implicit_scheme(scheme: str) -> None:
    flow = random_flow(scheme, "relu", gain=1.0)
    assert largest_ratio(flow, pairs=50, steps=3) <= 1 + 1e-12


@pytest.mark.parametrize("scheme", EXPLICIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_reach_the_limit_and_keep_it(scheme: str, dtype: torch.dtype) -> None:
    """h s ||K||^2 <= 2 r at all stages, in float64, and that is what stops them; numpy's norm, not ours."""
    flow = random_flow(scheme, "sigmoid", "cubic").to(dtype)
    c = torch.tensor(flow.scheme.c)
    K, _ = flow.field.sample(flow.times()[:-1, None] + 0.25 * c)
    norms = np.linalg.norm(K.table.detach().double().numpy(), 2, axis=(1, 2))
    share = 0.25 * 0.25 * norms**2 / (2 * TABLEAUX[scheme].contractivity_radius)
    assert share.max() <= 1 and share.max() > 1 - 1e-4 and len(share) >= 6


@pytest.mark.parametrize("scheme", EXPLICIT)
def test_certificate_of_another_package_agrees(scheme: str) -> None:
    flow = random_flow(scheme, "tanh", "cubic")
    assert certified_flow(flow.field, flow.times(), scheme) == 1.0
    flow.field.limit *= 1.01
    assert certified_flow(flow.field, flow.times(), scheme) > 1.0


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_limit_is_sharp(scheme: str) -> None:
    """x' = -k^2 x: a step above the limit moves all points apart, by |R(-h k^2)| = 1 + O(excess)."""
    flow = NonExpansive(1, 1, "identity", "constant", 1, 1.3, 7, scheme).double()
    nn.init.constant_(flow.field.weights("K").values, 100.0)
    x, y = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)
    assert 1 - 1e-12 < float(ratios(flow, x, y)) <= 1
    flow.field.limit *= 1.001
    assert float(ratios(flow, x, y)) > 1.01


@pytest.mark.parametrize("scheme", EXPLICIT)
def test_search_finds_what_a_weaker_limit_lets_through(scheme: str) -> None:
    """So that finding nothing above says something."""
    flow = random_flow(scheme, "identity", "steps")
    flow.field.limit *= 2.0
    assert largest_ratio(flow) > 1.1


def test_dead_neurons_leave_distances_as_they_are() -> None:
    """1 is attained: where K x + b < 0, a ReLU flow stands still."""
    flow = random_flow("kutta4", "relu")
    nn.init.constant_(flow.field.weights("b").values, -1e3)
    x, y = torch.randn(2, 20, D, dtype=torch.float64)
    assert torch.equal(ratios(flow, x, y), torch.ones(20, dtype=torch.float64))


def test_training_keeps_the_guarantee_and_its_gradient_is_exact() -> None:
    flow = random_flow("kutta4", "tanh", gain=0.5)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.3)
    x = torch.randn(30, D, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (-flow(x).square().sum()).backward()  # pulls the points apart
        optimizer.step()
    assert largest_ratio(flow) <= 1 + 1e-12

    parameters, loss = list(flow.parameters()), []
    direction = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(flow(x).square().sum(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    for e in (-2e-5, 2e-5):
        moved = {n: p + e * d for (n, p), d in zip(flow.named_parameters(), direction, strict=True)}
        loss.append(float(torch.func.functional_call(flow, moved, (x,)).square().sum()))
    assert (loss[1] - loss[0]) / 4e-5 == pytest.approx(slope, rel=1e-6)


# ---- The bound of the norm --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_is_never_below_the_norm(dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 7), (60, 60), (200, 5)):
        W = torch.randn(20, *shape, dtype=dtype) * 10.0 ** torch.randint(-8, 8, (20, 1, 1))
        W[0], W[1] = 0.0, W[1, :1] * torch.ones(shape[0], 1, dtype=dtype)  # nothing; rank 1
        true = np.linalg.norm(W.double().numpy(), 2, axis=(1, 2))
        bound = spectral_bound(W).double().numpy()
        assert (bound >= true).all() and (bound <= true * (1 + 1e-3)).all()


def test_limited_scales_only_what_is_too_large() -> None:
    W = torch.randn(3, 4, 5, dtype=torch.float64)
    W = W / torch.linalg.matrix_norm(W, 2)[:, None, None] * torch.tensor([0.5, 0.99, 7.0])[:, None, None]
    found = limited(W, 1.0)
    assert torch.equal(found[:2], W[:2])
    assert torch.allclose(found[2], W[2] / 7, rtol=1e-12)
    W[1] = 0.0  # its norm has no derivative
    assert torch.autograd.gradcheck(lambda W: limited(W, 1.0), W.requires_grad_())


# ---- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        *("dormand_prince", "lobatto", "stoermer_verlet", "chebyshev2", "chebyshev5"),
        Tableau("own", [[0, 0], [-1, 0]], [1.5, -0.5]),
    ],
)
def test_schemes_without_the_property_are_refused(scheme: str | Tableau) -> None:
    with pytest.raises(GliodeError, match=r"no circle contractivity.*take one of euler, heun"):
        NonExpansive(2, scheme=scheme)


@pytest.mark.parametrize(
    "sigma",
    [
        Activation.custom("sine", torch.sin, torch.cos, (-1, 1)),
        Activation.custom("steep", lambda z: torch.tanh(2 * z), lambda z: 2 / torch.cosh(2 * z) ** 2, (0, 2)),
    ],
)
def test_activations_without_it_are_refused(sigma: Activation) -> None:
    with pytest.raises(GliodeError, match=rf"slopes of activation {sigma.name} reach .* in \[0, 1\]"):
        NonExpansive(2, sigma=sigma)


def test_a_smaller_slope_allows_larger_weights() -> None:
    tanh, sigmoid = (NonExpansive(2, sigma=sigma).field.limit for sigma in ("tanh", "sigmoid"))
    assert sigmoid == pytest.approx(2 * tanh) and tanh == pytest.approx(math.sqrt(2 * 10))
    assert NonExpansive(2, scheme="gauss2").field.limit == math.inf


# ---- Layers and certified radii ---------------------------------------------------------------------------


def test_linear_layer_is_1_lipschitz_and_leaves_small_weights() -> None:
    layer = Lipschitz1Linear(7, 12).double()
    x, y = torch.randn(2, 50, 7, dtype=torch.float64)
    assert torch.allclose(ratios(layer, x, y), torch.ones(50, dtype=torch.float64))  # lifts isometrically
    with torch.no_grad():
        layer.weight *= 0.5
    assert torch.allclose(ratios(layer, x, y), torch.full((50,), 0.5, dtype=torch.float64))
    nn.init.normal_(layer.weight)
    norm = np.linalg.norm(layer.weight.detach().numpy(), 2)
    assert norm > 1 and largest_ratio(layer, 7) <= 1 + 1e-12
    assert torch.allclose(layer(x) - layer.bias, x @ layer.weight.T / norm, rtol=1e-12)


def classifier() -> nn.Sequential:
    return nn.Sequential(random_flow("heun", gain=1.0), Lipschitz1Linear(D, 4).double())


def test_no_attack_succeeds_within_the_certified_radius() -> None:
    net = classifier()
    x = 2 * torch.randn(100, D, dtype=torch.float64)
    scores = net(x).detach()
    labels, radius = scores.argmax(1), certified_radius(scores, 1.0)
    within = 0.999 * radius[:, None] * torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None, None]
    for r in radius.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist():
        attack = pgd(net, x, labels, r, steps=20)
        held = radius > r
        assert held.any() and torch.equal(attack.outputs.argmax(1)[held], labels[held])
    for shift in within:
        moved = x + shift * normalize(torch.randn_like(x))
        assert torch.equal(net(moved).argmax(1), labels)


def test_certified_radius_is_attained_by_two_scores() -> None:
    """Scores (x1, x2): the boundary is |x1 - x2| / sqrt 2 away."""
    net = Lipschitz1Linear(2, 2).double()
    nn.init.eye_(net.weight)
    x = torch.randn(50, 2, dtype=torch.float64)
    labels = net(x).argmax(1)
    away = normalize(torch.tensor([[-1.0, 1.0]], dtype=torch.float64)) * (1 - 2 * labels[:, None])
    radius = certified_radius(net(x), 1.0)[:, None]
    assert torch.equal(net(x + 0.999 * radius * away).argmax(1), labels)
    assert torch.equal(net(x + 1.001 * radius * away).argmax(1), 1 - labels)
