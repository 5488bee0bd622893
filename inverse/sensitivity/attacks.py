r"""Adversarial perturbations of a batch of inputs x (B, ...), within a ball.

    fgsm    eps sign(g), g the gradient of the loss: one step in Linf (Goodfellow, Shlens, Szegedy 2015)
    pgd     projected gradient ascent of the loss in an L2 or Linf ball (Madry et al. 2018)

The smallest perturbation that changes a decision is in `minimal`. What an attack finds is an upper bound
of the robustness: a stronger one may exist. Each sample is attacked by itself, so the map must treat them
one by one (evaluation mode).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from inverse.sensitivity.directional import Map, checked, output
from solvers.errors import GliodeError
from solvers.node.models import Node

Loss = Callable[[Tensor, Tensor], Tensor]
Bounds = tuple[float, float] | None
NORMS = ("L2", "Linf")


@dataclass(frozen=True)
class Attack:
    """perturbation: like x; norms: (B,), in the attack's norm; outputs: f(x + perturbation).

    Of a classifier, outputs.argmax(1) are the decisions under attack.
    """

    perturbation: Tensor
    norms: Tensor
    outputs: Tensor


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(scores)[label], (B,): the loss for integer labels."""
    return functional.cross_entropy(scores, labels, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """||outputs - targets||^2 of each sample, (B,): the loss of a regression."""
    return (outputs - targets).flatten(1).square().sum(1)


def fgsm(
    f: Map, x: Tensor, labels: Tensor, eps: float, loss: Loss = cross_entropy, bounds: Bounds = None
) -> Attack:
    """x + eps sign(gradient of the loss), in the box of `bounds`: the steepest step in Linf.

    labels: (B,) classes, or the floating-point targets of another loss, such as `squared_error`; loss:
    (outputs, labels) -> (B,); bounds: (lowest, highest) of an input's entries, such as (0, 1) of pixels.
    """
    x, labels = _prepare(f, x, labels, eps, bounds)
    gradient, _, _ = _ascent(f, x, labels, loss)
    perturbation = _into_box(x, eps * gradient.sign(), bounds)
    return Attack(perturbation, lengths(perturbation, "Linf"), evaluate(f, x + perturbation))


def pgd(
    f: Map,
    x: Tensor,
    labels: Tensor,
    eps: float,
    norm: str = "L2",
    steps: int = 10,
    step: float | None = None,
    loss: Loss = cross_entropy,
    bounds: Bounds = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Attack:
    """The worst of x and the iterates of projected gradient ascent in the ball of radius eps.

    norm: "L2" (steps along g / ||g||) or "Linf" (along sign g); step: its length, 2.5 eps / steps unless
    given; random_start: from a point drawn uniformly in the ball, else from x; generator: for its seed
    (None: torch's own); labels, loss, bounds as in `fgsm`. Worst is a wrong decision before a right one
    (integer labels), then the larger loss.
    """
    if norm not in NORMS:
        raise GliodeError(f"norm {norm!r} is not one of {', '.join(NORMS)}")
    if steps < 1:
        raise GliodeError(f"steps: {steps}; give 1 or more")
    length = 2.5 * eps / steps if step is None else step
    x, labels = _prepare(f, x, labels, eps, bounds)
    if not (math.isfinite(length) and length > 0):
        raise GliodeError(f"step: {length}; its length is positive and finite")
    tiny = torch.finfo(x.dtype).tiny
    r = best = torch.zeros_like(x)
    gradient, value, outputs = _ascent(f, x, labels, loss)
    worst = _Worst(value, outputs, labels)
    for k in range(steps + random_start):
        if random_start and k == 0:
            r = _random(x, eps, norm, generator)
        elif norm == "L2":
            r = r + length * gradient / wide(lengths(gradient).clamp(min=tiny), x)
            r = r * wide((eps / lengths(r).clamp(min=tiny)).clamp(max=1), x)
        else:
            r = (r + length * gradient.sign()).clamp(-eps, eps)
        r = _into_box(x, r, bounds)
        gradient, value, outputs = _ascent(f, x + r, labels, loss)
        best = torch.where(wide(worst.update(value, outputs), x), r, best)
    return Attack(best, lengths(best, norm), worst.outputs)


class _Worst:
    """The worst loss and outputs of each sample so far."""

    def __init__(self, value: Tensor, outputs: Tensor, labels: Tensor) -> None:
        self.labels, self.value, self.outputs = labels, value, outputs
        self.wrong = self._wrong(outputs)

    def _wrong(self, outputs: Tensor) -> Tensor:
        if self.labels.is_floating_point():
            return torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)
        return outputs.argmax(1) != self.labels

    def update(self, value: Tensor, outputs: Tensor) -> Tensor:
        """Which samples are worse now, (B,)."""
        wrong = self._wrong(outputs)
        worse = (wrong & ~self.wrong) | ((wrong == self.wrong) & (value > self.value))
        self.value = torch.where(worse, value, self.value)
        self.wrong = torch.where(worse, wrong, self.wrong)
        self.outputs = torch.where(wide(worse, outputs), outputs, self.outputs)
        return worse


def _ascent(f: Map, x: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's gradient in x, the loss (B,), and f(x)."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = output(f(leaf))
        value = loss(outputs, labels)
    if value.shape != (len(x),):
        raise GliodeError(f"loss: shape {tuple(value.shape)}; it must give one number a sample, ({len(x)},)")
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise GliodeError("f: the loss does not depend on x through the tape; keep f in torch")
    if not bool(torch.isfinite(gradient).all()):
        raise GliodeError("f: the gradient of the loss is NaN or infinite; look at f near x")
    return gradient, value.detach(), outputs.detach()


def _random(x: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """Uniform in the ball of each sample."""
    device = x.device if generator is None else generator.device
    if norm == "Linf":
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        return eps * (2 * u - 1)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    u = torch.rand(len(x), generator=generator, dtype=x.dtype, device=device).to(x.device)
    return z * wide(eps * u ** (1 / math.prod(x.shape[1:])) / lengths(z), x)


def _prepare(f: Map, x: Tensor, labels: Tensor, eps: float, bounds: Bounds) -> tuple[Tensor, Tensor]:
    x = checked(x, "x")
    if not (math.isfinite(eps) and eps > 0):
        raise GliodeError(f"eps: {eps}; the radius is positive and finite")
    if bounds is not None and bool(((x < bounds[0]) | (x > bounds[1])).any()):
        low, high = float(x.min()), float(x.max())
        raise GliodeError(f"bounds: {bounds}, but x reaches from {low:g} to {high:g}; scale x, or mend them")
    outputs = evaluate(f, x)
    return x, labels.detach() if labels.is_floating_point() else integers(labels, outputs)


def _into_box(x: Tensor, r: Tensor, bounds: Bounds) -> Tensor:
    """r with x + r inside the bounds; x is, so that no entry of r grows."""
    return r if bounds is None else (x + r).clamp(*bounds) - x


# ---- Shared with the minimal attack -----------------------------------------------------------------------


def evaluate(f: Map, x: Tensor) -> Tensor:
    """f(x), checked."""
    if x.ndim < 2:
        raise GliodeError(f"x: shape {tuple(x.shape)}; attacks take batches (B, ...), of one sample x[None]")
    for name, module in f.named_modules() if isinstance(f, nn.Module) else ():
        noisy = isinstance(module, _BatchNorm | _DropoutNd) or (isinstance(module, Node) and module.noise)
        if noisy and module.training:
            raise GliodeError(f"f: {name or type(module).__name__} is in training mode; call f.eval()")
    with torch.no_grad():
        out = output(f(x))
    if out.ndim < 1 or len(out) != len(x):
        raise GliodeError(
            f"f: returned shape {tuple(out.shape)} for {len(x)} samples; the first axis is theirs"
        )
    if not bool(torch.isfinite(out).all()):
        raise GliodeError("f: it returned NaN or infinite values")
    return out.detach()


def decisions(f: Map, x: Tensor) -> Tensor:
    """(B,)."""
    with torch.no_grad():
        return f(x).argmax(1)


def integers(labels: Tensor, scores: Tensor) -> Tensor:
    """Class numbers that fit the scores."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise GliodeError(
            f"labels: {labels.dtype} {tuple(labels.shape)} for scores {tuple(scores.shape)}; give one "
            "integer a sample (or targets in floating point, with a loss for them)"
        )
    outside = (labels < 0) | (labels >= scores.shape[1])
    if bool(outside.any()):
        raise GliodeError(f"labels: class {int(labels[outside][0])}, there are {scores.shape[1]} classes")
    return labels.detach().to(scores.device).long()


def lengths(r: Tensor, norm: str = "L2") -> Tensor:
    """The norm of each sample, (B,)."""
    return torch.linalg.vector_norm(r.flatten(1), 2 if norm == "L2" else math.inf, 1)


def wide(v: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) to go with (B, ...)."""
    return v.reshape(-1, *[1] * (like.ndim - 1))
