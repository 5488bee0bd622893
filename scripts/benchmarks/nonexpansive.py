"""Non-expansive networks: how far any pair of points moves apart, and digits under attack beside a rival.

Ratios ||y(T) - y'(T)|| / ||y(0) - y'(0)|| in float64 of 10,000 pairs in 64 dimensions (digits, a digit and a
point nearby, points at random), and of the worst of them after gradient ascent on the ratio.

Digits: pixels in [0, 1], one stratified split with 360 test pictures, the mean of several seeds. Both
networks have 8 layers of 64 neurons and a linear head, so the same number of parameters; both are trained by
the same method for the same epochs, with one of the same losses; the unconstrained one may have weight decay
besides. Which: what does best on a validation part at the radii 1 and 2 together, of what keeps 90 % without
an attack (`--full` chooses anew). A picture counts where it survives projected gradient ascent of the
cross-entropy and of the margin: the small scores of a 1-Lipschitz network mislead the former, by 10 points
and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional

from inverse.datasets import Digits, digits
from inverse.losses import ClassLoss
from inverse.methods import Adam
from inverse.sensitivity import certified_radius, cross_entropy, pgd
from inverse.training import train
from scripts.benchmarks import Check
from solvers.node.fields import Standalone
from solvers.node.models import Node
from solvers.node.nonexpansive import Lipschitz1Linear, NonExpansive
from solvers.ode.tableaux import TABLEAUX

DIM, LAYERS, PAIRS = 64, 8, 10_000
RADII = (0.5, 1.0, 2.0)
CLEAN = 90.0
ADMISSIBLE = [name for name, scheme in TABLEAUX.items() if scheme.contractivity_radius]


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """The label's score minus the largest of the others, (n,)."""
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return scores.gather(1, labels[:, None])[:, 0] - others.amax(1)


class Margins(ClassLoss):
    """Cross-entropy of `sharpness` s, plus `weight` times the share of margins below `target`, made smooth by
    a sigmoid of width `softness`.

    A 1-Lipschitz network cannot raise its margins by larger weights: what it is to reach must be said.
    """

    def __init__(
        self, sharpness: float, weight: float = 0.0, target: float = 0.0, softness: float = 1.0
    ) -> None:
        super().__init__(10)
        self.sharpness, self.weight, self.target, self.softness = sharpness, weight, target, softness

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(self.sharpness * scores, labels)
        if not self.weight:
            return loss
        short = torch.sigmoid((self.target - margins(scores, labels)) / self.softness)
        return loss + self.weight * short.mean()


# ---- The ratio of a pair ----------------------------------------------------------------------------------


Pairs = tuple[Tensor, Tensor]


def points(count: int) -> Tensor:
    """(count, DIM): a third digits, a third each near one of those, a third at random."""
    generator = torch.Generator().manual_seed(0)
    third = count // 3
    drawn = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    pictures = digits(0, dtype=torch.float64).train[0]
    z = 3 * drawn
    z[:third] = pictures[torch.randint(len(pictures), (third,), generator=generator)]
    # No nearer than 0.01, of which the rounding errors of points of size 4 are 1e-13.
    distance = 10 ** (-2 * torch.rand(third, 1, generator=generator, dtype=torch.float64))
    z[third : 2 * third] = z[:third] + distance * functional.normalize(drawn[third : 2 * third])
    return z


def paired(explicit: bool) -> tuple[Tensor, Pairs]:
    """Points and the places of 10,000 pairs of them; for a costly implicit scheme all pairs of few points."""
    if not explicit:
        z = points(142)
        i, j = torch.triu_indices(len(z), len(z), 1)
        return z, (i, j)
    z = points(2 * PAIRS)
    other = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(1)) + PAIRS
    near = torch.arange(PAIRS // 2)
    other[near] = near + len(z) // 3
    return z, (torch.arange(PAIRS), other)


def ratios(flow: nn.Module, z: Tensor, pairs: Pairs) -> Tensor:
    end, (i, j) = flow(z), pairs
    start = (z[i] - z[j]).norm(dim=1).clamp(min=1e-6)  # a digit may be drawn twice
    return (end[i] - end[j]).norm(dim=1) / start


def searched(flow: nn.Module, z: Tensor, pairs: Pairs, count: int, steps: int) -> float:
    """The largest ratio on the way of the worst pairs by gradient ascent on it, at their distances."""
    with torch.no_grad():
        worst = ratios(flow, z, pairs).topk(count).indices
    x, y = (z[part[worst]] for part in pairs)
    distance, places = (x - y).norm(dim=1, keepdim=True), torch.arange(count)
    best = 0.0
    for _ in range(steps):
        z = torch.cat([x, y]).requires_grad_()
        found = ratios(flow, z, (places, places + count))
        best = max(best, float(found.detach().max()))
        (up,) = torch.autograd.grad(found.sum(), z)
        x, y = (z.detach() + 0.3 * functional.normalize(up)).chunk(2)
        middle, half = (x + y) / 2, functional.normalize(x - y) * distance / 2
        x, y = middle + half, middle - half
    return best


def flow_of(scheme: str) -> NonExpansive:
    return NonExpansive(DIM, DIM, "relu", "linear", 5, steps=LAYERS, scheme=scheme)


def expansion() -> list[Check]:
    """Random weights at the limit, and trained ones: an explicit scheme's own, Euler's for the implicit."""
    data = digits(0).train
    checks: list[Check] = []
    euler: dict[str, Tensor] = {}
    for scheme in ADMISSIBLE:
        explicit = TABLEAUX[scheme].explicit
        z, pairs = paired(explicit)
        torch.manual_seed(0)
        net = nn.Sequential(flow_of(scheme), Lipschitz1Linear(DIM, 10))
        flow = net[0]
        assert isinstance(flow, NonExpansive)
        flow.field.reset(gain=3, rough=0.3)
        nn.init.normal_(flow.field.weights("b").values)
        for weights in ("random", "trained"):
            if weights == "trained" and explicit:
                train(net.float(), Margins(3), data, Adam(0.01), epochs=4, batch=100)
                euler = euler or flow.state_dict()
            elif weights == "trained":
                flow.load_state_dict(euler)
            net.double()
            with torch.no_grad():
                found = float(ratios(flow, z, pairs).max())
            worst = searched(flow, z, pairs, *((200, 60) if explicit else (20, 5)))
            for value, what in ((found, "largest ratio - 1"), (worst, "the same, by ascent")):
                checks.append(Check.at_most(f"{scheme}, {weights} weights: {what}", value - 1, 1e-12))
    return checks


# ---- Digits under attack ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a network is trained with; loss: the arguments of `Margins`; decay: that of `train`."""

    constrained: bool
    loss: tuple[float, ...]
    decay: float = 0.0


LOSSES: tuple[tuple[float, ...], ...] = (
    *((1.0,), (3.0,), (10.0,)),
    *((3.0, 10.0, 2.8, 0.5), (3.0, 20.0, 2.8, 0.5), (5.0, 20.0, 2.8, 0.5), (5.0, 15.0, 2.5, 0.4)),
)
DECAYS = (0.0, 0.1, 0.3, 1.0, 3.0)
CHOSEN = {  # by `chosen`
    True: Recipe(True, (5.0, 20.0, 2.8, 0.5)),
    False: Recipe(False, (3.0, 20.0, 2.8, 0.5), 1.0),
}


def network(constrained: bool) -> nn.Sequential:
    """64 pixels -> 10 scores: a non-expansive flow and head, or a residual network and head, of one size."""
    if constrained:
        flow = NonExpansive(DIM, DIM, "relu", "steps", LAYERS, steps=LAYERS)
        return nn.Sequential(flow, Lipschitz1Linear(DIM, 10))
    field = Standalone(DIM, "relu", "steps", LAYERS)
    field.reset()
    return nn.Sequential(Node(field, steps=LAYERS, scheme="euler"), nn.Linear(DIM, 10))


def trained(recipe: Recipe, data: tuple[Tensor, Tensor], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = network(recipe.constrained)
    method = Adam(0.03, cosine=True)
    train(net, Margins(*recipe.loss), data, method, epochs=60, batch=100, decay=recipe.decay, seed=seed)
    return net


def survivors(net: nn.Module, data: tuple[Tensor, Tensor], radius: float, steps: int) -> float:
    """The share that no attack turns."""
    x, labels = data
    right = torch.ones(len(x), dtype=torch.bool)
    for loss in (cross_entropy, lambda s, y: -margins(s, y)):
        generator = torch.Generator().manual_seed(0)
        attack = pgd(net, x, labels, radius, "L2", steps, loss=loss, bounds=(0.0, 1.0), generator=generator)
        right &= attack.outputs.argmax(1) == labels
    return float(right.double().mean())


def certified(net: nn.Module, data: tuple[Tensor, Tensor], radius: float) -> float:
    """The share that no perturbation within the radius turns, of a 1-Lipschitz net."""
    scores = net(data[0])
    return float(((scores.argmax(1) == data[1]) & (certified_radius(scores, 1.0) > radius)).double().mean())


@cache
def validated(recipe: Recipe) -> list[float]:
    """Accuracy without an attack and at each radius, on the validation part, the mean of two seeds."""
    parts = digits(0, validation=300)
    nets = [trained(recipe, parts.train, seed) for seed in (100, 101)]
    return [mean(column) for column in zip(*(row(net, parts.validation, 10) for net in nets), strict=True)]


def chosen(constrained: bool) -> Recipe:
    """The best at the two larger radii together on the validation part, of those that keep CLEAN."""
    recipes = [Recipe(constrained, *found) for found in product(LOSSES, (0.0,) if constrained else DECAYS)]
    able = [recipe for recipe in recipes if validated(recipe)[0] >= CLEAN]
    return max(able, key=lambda recipe: sum(validated(recipe)[2:]))


def row(net: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """Accuracy without an attack and at each of RADII, in percent."""
    right = (net(data[0]).argmax(1) == data[1]).double().mean()
    return [100 * float(right), *(100 * survivors(net, data, radius, steps) for radius in RADII)]


def attacked(full: bool) -> list[Check]:
    """Trained on all that is not test, on the test part."""
    parts, checks, means = digits(0), [], []
    recipes = {
        "non-expansive": chosen(True) if full else CHOSEN[True],
        "unconstrained": chosen(False) if full else CHOSEN[False],
    }
    for name, recipe in recipes.items():
        nets = [trained(recipe, parts.train, seed) for seed in range(5 if full else 3)]
        columns = list(zip(*(row(net, parts.test, 20) for net in nets), strict=True))
        means.append([mean(column) for column in columns])
        told = ", ".join(f"{mean(column):.1f} +- {stdev(column):.1f}" for column in columns)
        checks.append(Check(f"{name}: chosen loss and decay", f"{recipe.loss}, {recipe.decay:g}"))
        checks.append(Check(f"{name}: accuracy at 0, 0.5, 1, 2", told, "%"))
        if recipe.constrained:
            held = mean(certified(net, parts.test, RADII[0]) for net in nets)
            checks.append(Check(f"{name}: certified accuracy at 0.5", 100 * held, "%"))
    ours, theirs = means
    checks.append(Check.at_least("non-expansive: accuracy without an attack", ours[0], CLEAN, "%"))
    for place, radius in enumerate(RADII, 1):
        ahead = ours[place] - theirs[place]
        bar = ("> 0", ahead > 0) if radius >= 1 else (None, None)
        checks.append(Check(f"non-expansive ahead at radius {radius:g}", ahead, "points", *bar))
    return [*checks, attainable(parts)]


def attainable(parts: Digits) -> Check:
    """No classifier that is right on the training part survives more at the largest radius."""
    (known, classes), (x, labels) = parts.train, parts.test
    foreign = torch.cdist(x, known).masked_fill(labels[:, None] == classes, torch.inf).amin(1)
    share = 100 * float((foreign > RADII[-1]).double().mean())
    return Check("test pictures with no training picture of another class within 2", share, "%")


def run(full: bool) -> list[Check]:
    """All checks; `--full`: 5 seeds instead of 3, the recipes chosen anew."""
    torch.set_num_threads(1)
    return [*expansion(), *attacked(full)]
