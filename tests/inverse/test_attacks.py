"""Attacks against closed forms: hyperplanes, an ellipse, dual norms, and every direction of the plane."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from inverse.sensitivity import certified_flow, certified_radius, fgsm, minimal_attack, pgd, squared_error
from solvers.errors import GliodeError
from solvers.node.fields import Standalone
from solvers.node.models import Node


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(inputs: int, classes: int, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(inputs, classes)
    with torch.no_grad():
        layer.weight.copy_(numbers(classes, inputs))
        layer.bias.copy_(numbers(classes, seed=1))
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimal_attack_on_an_affine_classifier_is_the_distance_to_the_nearest_hyperplane(
    dtype: torch.dtype,
) -> None:
    f, x = affine(12, 6, dtype), numbers(40, 12, seed=2).to(dtype)
    scores = f(x).detach()
    own = scores.argmax(1)
    W = f.weight.detach()
    distance = torch.stack(
        [
            min(
                (scores[b, own[b]] - scores[b, j]) / (W[own[b]] - W[j]).norm()
                for j in range(6)
                if j != own[b]
            )
            for b in range(40)
        ]
    )
    found = minimal_attack(lambda x: f(x), x)
    assert found.perturbation.dtype == dtype
    torch.testing.assert_close(
        found.norms, 1.001 * distance, rtol=2e-7 if dtype == torch.float64 else 1e-3, atol=0
    )
    torch.testing.assert_close(found.norms, found.perturbation.norm(dim=1))
    assert bool((found.outputs.argmax(1) != own).all())
    assert bool((f(x + 0.997 * found.perturbation).argmax(1) == own).all())
    # Images are batches of any shape; two classes; and the same in one go or one by one.
    image = nn.Sequential(nn.Flatten(), f)
    one_by_one = torch.cat([minimal_attack(image, v.view(1, 3, 4)).perturbation for v in x[:5]])
    torch.testing.assert_close(one_by_one.flatten(1), found.perturbation[:5], rtol=1e-4, atol=1e-6)


def ellipse(x: Tensor) -> Tensor:
    """Inside or outside of (x/2)^2 + y^2 = 1."""
    level = (x[:, 0] / 2) ** 2 + x[:, 1] ** 2 - 1
    return torch.stack([level, -level], 1)


def distance_to_ellipse(x: float, y: float) -> float:
    """The nearest point is (4x / (4 + t), y / (1 + t)), t in (-1, 0) a root (inside, x and y > 0)."""
    t = brentq(lambda t: (2 * x / (4 + t)) ** 2 + (y / (1 + t)) ** 2 - 1, -1 + 1e-9, 0, xtol=1e-14)
    return math.hypot(x - 4 * x / (4 + t), y - y / (1 + t))


def test_minimal_attack_finds_the_nearest_point_of_a_curved_boundary_and_newton_alone_does_not() -> None:
    points = [(0.2, 0.1), (1.0, 0.2), (1.0, 0.5), (1.5, 0.3), (0.5, 0.05)]
    exact = torch.tensor([distance_to_ellipse(*p) for p in points], dtype=torch.float64)
    x = torch.tensor(points, dtype=torch.float64)
    newton = minimal_attack(ellipse, x, refine=0).norms / 1.001
    found = minimal_attack(ellipse, x, refine=40).norms / 1.001
    assert bool((newton > exact).all()) and float((newton / exact).max()) > 1.02
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)
    assert bool((found > exact * (1 - 1e-6)).all())


def test_minimal_attack_on_a_neural_ode_against_all_directions() -> None:
    """A standalone NODE of the plane: the least radius at which one of 360 directions changes its mind."""
    field = Standalone(2, knots=4, duration=3.0)
    field.reset(gain=2.0, rough=1.0, generator=torch.Generator().manual_seed(2))
    node = Node(field, duration=3.0, steps=12).double()
    x = 0.5 * numbers(4, 2, seed=3)
    own = node(x).argmax(1)
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)[:-1]
    rays = torch.stack([angle.cos(), angle.sin()], 1)
    radii = torch.linspace(0, 3, 301, dtype=torch.float64)[1:]
    found = minimal_attack(node, x)
    for b in range(len(x)):
        with torch.no_grad():
            changed = node(x[b] + radii[:, None, None] * rays).argmax(-1) != own[b]
        true = float(radii[changed.any(1)][0])  # at most 0.01 too large
        assert true - 0.012 < float(found.norms[b]) < 1.002 * true
    bound = certified_radius(node(x), certified_flow(field, node.times(), node.scheme))
    assert bool((bound > 0).all()) and bool((bound <= found.norms).all())


def test_minimal_attack_leaves_alone_what_is_wrong_and_says_where_there_is_no_boundary() -> None:
    f, x = affine(5, 3, torch.float64), numbers(8, 5, seed=2)
    own = f(x).argmax(1)
    labels = torch.where(torch.arange(8) < 4, own, (own + 1) % 3)
    found = minimal_attack(f, x, labels)
    assert (
        bool((found.norms[:4] > 0).all()) and not found.norms[4:].any() and not found.perturbation[4:].any()
    )
    assert torch.equal(minimal_attack(f, x).perturbation[:4], found.perturbation[:4])
    constant = minimal_attack(lambda x: torch.stack([0 * x[:, 0], 0 * x[:, 0] - 1], 1), x)
    assert bool(constant.norms.isinf().all()) and not constant.perturbation.any()
    sliver = lambda x: torch.cat([(x - 0.5).abs() - 1e-4, 0 * x], 1)  # noqa: E731
    thin = minimal_attack(
        sliver, torch.zeros(1, 1, dtype=torch.float64)
    )  # the overshoot would leave it again
    assert int(thin.outputs.argmax()) == 1 and float(thin.norms) == pytest.approx(0.4999)
    # The nearest class is the second in score: one competitor misses it.
    W = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    slopes = lambda x: x @ W.mT + torch.tensor([0.0, -1.0, -0.5]).double()  # noqa: E731
    start = torch.zeros(1, 2, dtype=torch.float64)
    assert float(minimal_attack(slopes, start).norms) == pytest.approx(0.1 * 1.001)
    assert float(minimal_attack(slopes, start, competitors=1).norms) == pytest.approx(0.5 * 1.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacks_on_two_linear_classes_reach_the_dual_norm(dtype: torch.dtype) -> None:
    """The gap w . x falls by eps ||w||_2 in the L2 ball, by eps ||w||_1 in the Linf ball, and no further."""
    W = numbers(2, 9).to(dtype)
    w, x, labels = W[0] - W[1], numbers(7, 9, seed=1).to(dtype), torch.zeros(7, dtype=torch.long)

    def f(x: Tensor) -> Tensor:
        return x @ W.mT

    def fall(perturbation: Tensor) -> Tensor:
        return -(perturbation @ w)

    tight: dict[str, Any] = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0.0}
    for norm, dual in (("L2", w.norm()), ("Linf", w.abs().sum())):
        attack = pgd(f, x, labels, 0.3, norm, random_start=False)
        torch.testing.assert_close(fall(attack.perturbation), (0.3 * dual).expand(7), **tight)
        torch.testing.assert_close(attack.norms, torch.full((7,), 0.3, dtype=dtype), **tight)
        torch.testing.assert_close(attack.outputs, f(x + attack.perturbation))
        drawn = pgd(f, x, labels, 0.3, norm, steps=20, step=0.1, generator=torch.Generator().manual_seed(0))
        again = pgd(f, x, labels, 0.3, norm, steps=20, step=0.1, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn.perturbation, again.perturbation) and drawn.perturbation.dtype == dtype
        assert bool((fall(drawn.perturbation) > 0.99 * 0.3 * dual).all())
        assert bool((drawn.norms <= 0.3 * (1 + 1e-6)).all())
    once = fgsm(f, x, labels, 0.3)
    torch.testing.assert_close(fall(once.perturbation), (0.3 * w.abs().sum()).expand(7), **tight)
    torch.testing.assert_close(once.norms, torch.full((7,), 0.3, dtype=dtype), **tight)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_pixels_stay_in_their_box_and_in_the_ball(norm: str) -> None:
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = numbers(20, 1, 4, 4).sigmoid()
    labels = f(x).argmax(1)
    generator = torch.Generator().manual_seed(0)
    attack = pgd(f, x, labels, 0.4, norm, bounds=(0, 1), generator=generator)
    moved = x + attack.perturbation
    assert (
        float(moved.min()) >= 0 and float(moved.max()) <= 1 and float(attack.norms.max()) <= 0.4 * (1 + 1e-12)
    )
    free = pgd(f, x, labels, 0.4, norm, generator=generator)
    assert float((x + free.perturbation).max()) > 1
    once = fgsm(f, x, labels, 0.4, bounds=(0, 1))
    assert float((x + once.perturbation).min()) >= 0 and float((x + once.perturbation).max()) <= 1


def test_the_random_start_is_uniform_in_the_ball() -> None:
    """One step of no length to speak of: what is kept are starts. ||r|| / eps has the law u^(1/n)."""
    x, labels = torch.zeros(4000, 3, dtype=torch.float64), torch.zeros(4000, dtype=torch.long)

    def f(x: Tensor) -> Tensor:  # the larger the norm, the larger the loss: never x itself
        return torch.stack([-x.square().sum(1), 0 * x[:, 0]], 1)

    generator = torch.Generator().manual_seed(0)
    attack = pgd(f, x, labels, 2.0, steps=1, step=1e-9, generator=generator)
    assert bool((attack.norms <= 2).all())
    volume = (attack.norms / 2) ** 3
    assert float(volume.mean()) == pytest.approx(0.5, abs=0.02) and float(volume.var()) == pytest.approx(
        1 / 12, rel=0.05
    )
    cube = pgd(f, x, labels, 2.0, "Linf", steps=1, step=1e-9, generator=generator).perturbation
    assert float(cube.mean()) == pytest.approx(0, abs=0.05) and float(cube.var()) == pytest.approx(
        4 / 3, rel=0.05
    )


def test_pgd_keeps_the_worst_iterate() -> None:
    """A narrow trough of the score at 0.5: long steps pass over it and end elsewhere."""

    def f(x: Tensor) -> Tensor:
        score = (x[:, 0] - 0.5).abs() - 0.1 * x[:, 0]
        return torch.stack([score, torch.zeros_like(score)], 1)

    x, labels = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    attack = pgd(f, x, labels, 0.95, steps=3, step=0.5, random_start=False)
    assert float(attack.perturbation) == pytest.approx(0.5)  # of the iterates 0.5, 0.95 or 0, ...
    assert int(attack.outputs.argmax(1)) == 1
    stays = pgd(f, x + 0.5, labels, 0.3, steps=3, random_start=False)  # already there: nothing is worse
    assert not stays.perturbation.any() and float(stays.outputs[0, 0]) == pytest.approx(-0.05)


def test_a_wrong_decision_counts_more_than_a_larger_loss() -> None:
    """Up to 0.3 one class overtakes the right one a little; beyond, three classes come close to it."""

    def f(x: Tensor) -> Tensor:
        t = x[:, 0]
        near, far = t - 0.1 - 9 * (t > 0.3), torch.where(t > 0.3, t - 1, t - 9)
        return torch.stack([torch.zeros_like(t), near, far, far, far], 1)

    x, labels = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    loss = nn.functional.cross_entropy
    wrong, right = f(x + 0.25), f(x + 0.75)
    assert int(wrong.argmax()) == 1 and int(right.argmax()) == 0 and loss(right, labels) > loss(wrong, labels)
    attack = pgd(f, x, labels, 0.75, steps=3, step=0.25, random_start=False)
    assert float(attack.perturbation) == pytest.approx(0.25) and int(attack.outputs.argmax()) == 1


def test_attacks_of_a_regression() -> None:
    """f(x) = A x against y: the loss's gradient is 2 A^T (A x - y)."""
    A, x, y = numbers(4, 6), numbers(5, 6, seed=1), numbers(5, 4, seed=2)
    attack = fgsm(lambda x: x @ A.mT, x, y, 0.1, loss=squared_error)
    torch.testing.assert_close(attack.perturbation, 0.1 * ((x @ A.mT - y) @ A).sign())
    clean, worst = squared_error(x @ A.mT, y), squared_error(attack.outputs, y)
    assert bool((worst > clean).all())
    strong = pgd(lambda x: x @ A.mT, x, y, 0.1, "Linf", steps=20, loss=squared_error)
    vertices = 0.1 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    largest = ((x[:, None] + vertices) @ A.mT - y[:, None]).square().sum(2).max(1).values  # a convex loss's
    found = squared_error(strong.outputs, y)
    assert bool((found <= largest * (1 + 1e-12)).all()) and bool((found >= 0.9 * largest).all())


def test_attacks_refuse() -> None:
    f, x, labels = affine(4, 3, torch.float64), numbers(2, 4), torch.tensor([0, 1])
    dropout = nn.Sequential(nn.Dropout(0.5), f)
    for attack, message in [
        (lambda: pgd(f, x, labels, -1.0), "eps: -1.0"),
        (lambda: pgd(f, x, labels, 1.0, "L1"), "'L1' is not one of L2, Linf"),
        (lambda: pgd(f, x, labels, 1.0, steps=0), "steps: 0"),
        (lambda: pgd(f, x, labels, 1.0, step=-1.0), "step: -1.0"),
        (lambda: pgd(f, x, labels, 1.0, bounds=(0, 1)), "but x reaches from"),
        (lambda: pgd(f, x, torch.tensor([0, 3]), 1.0), "class 3, there are 3"),
        (lambda: pgd(f, x, torch.tensor([0]), 1.0), "one integer a sample"),
        (lambda: fgsm(f, x, labels, 1.0, loss=nn.functional.cross_entropy), "one number a sample"),
        (lambda: fgsm(lambda x: f(x.detach()), x, labels, 1.0), "does not depend on x through the tape"),
        (lambda: fgsm(f, x[0], labels, 1.0), r"x\[None\]"),
        (lambda: fgsm(lambda x: f(x).T, x, labels, 1.0), "the first axis is theirs"),
        (lambda: fgsm(lambda x: f(x) / 0, x, labels, 1.0), "it returned NaN or infinite"),
        (lambda: fgsm(dropout, x, labels, 1.0), "0 is in training mode; call f.eval()"),
        (lambda: minimal_attack(dropout, x), "in training mode"),
        (lambda: minimal_attack(f, x, steps=0), "steps 0"),
        (lambda: minimal_attack(lambda x: f(x)[:, :1], x), "classes >= 2"),
        (lambda: minimal_attack(lambda x: f(x.detach()), x), "through the tape"),
        (lambda: minimal_attack(f, x.long()), "floating-point"),
    ]:
        with pytest.raises(GliodeError, match=message):
            attack()
    assert fgsm(dropout.eval(), x, labels, 1.0).norms.shape == (2,)
