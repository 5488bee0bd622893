r"""Losses of what a model returns for n inputs: means over them.

Of a classifier's scores s (n, C) for labels (n,):

    SquaredLoss     1/(2n) sum_i |h(s_i) - y_i|^2,    h the identity or the sigmoid, y one-hot: off or on
    CrossEntropy    -1/n sum_i log p_i,    p = softmax(s) at the label
    both            + magnitude/2 1/n sum_i |s_i|^2, which keeps scores small

Of fields x (n, ...), images or states, for targets y of the same shape, and of costs:

    SquaredError    1/(2n) sum_i |x_i - y_i|^2
    LogError        1/(2n) sum_i log(|x_i - y_i|^2 / size + floor): minus the mean PSNR, but for a factor
    Mean            1/n sum_i c_i,    of a model that returns its costs (n, 1) itself

C = 1 is the case of two classes told apart by one score: y is `on` for label 1 and `off` for label 0, p the
sigmoid of s or of -s. The penalty of the weights is a regularizer (inverse.regularizers.tikhonov).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from solvers.errors import GliodeError


class Loss(ABC):
    """loss(outputs, targets) -> a 0-d tensor on the tape, twice differentiable.

    A loss that is half the mean square of a residual has `residual(outputs, targets)` too. figure: the name
    of what `measure` returns.
    """

    figure: str

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch."""

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> float:
        """What a user wants to know of the outputs beside the loss."""

    @abstractmethod
    def require_fit(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Raise GliodeError unless the outputs, and the targets where given, are such as the loss takes."""


class SquaredError(Loss):
    """1/(2n) sum_i |x_i - y_i|^2 of fields; its figure is the relative error ||x - y|| / ||y|| of all."""

    figure = "relative_error"

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """x - y, on the tape."""
        self.require_fit(outputs, targets)
        return outputs - targets

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.residual(outputs, targets).square().sum() / (2 * len(outputs))

    def measure(self, outputs: Tensor, targets: Tensor) -> float:
        return float((outputs - targets).norm() / targets.norm())

    def require_fit(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        if targets is not None and (outputs.shape, outputs.dtype) != (targets.shape, targets.dtype):
            raise GliodeError(
                f"targets: {targets.dtype} of shape {tuple(targets.shape)}, the model returns "
                f"{outputs.dtype} of shape {tuple(outputs.shape)}; give one such for each input"
            )


class LogError(Loss):
    """1/(2n) sum_i log(|x_i - y_i|^2 / size + 1e-6) of images in [0, 1]; its figure is the mean PSNR in dB.

    Easy pictures count as much as hard ones, of which the squared error sees little else.
    """

    figure = "psnr"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        SquaredError().require_fit(outputs, targets)
        return ((outputs - targets).square().flatten(1).mean(1) + 1e-6).log().mean() / 2

    def measure(self, outputs: Tensor, targets: Tensor) -> float:
        return float(-10 * (outputs - targets).square().flatten(1).mean(1).log10().mean())

    def require_fit(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        SquaredError().require_fit(outputs, targets)


class Mean(Loss):
    """1/n sum_i c_i: the model returns the cost of each input (n, 1); the targets say nothing."""

    figure = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.require_fit(outputs)
        return outputs.mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> float:
        return float(outputs.mean())

    def require_fit(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        if outputs.ndim != 2 or outputs.shape[1] != 1:
            raise GliodeError(f"model: costs of shape {tuple(outputs.shape)}; return (n, 1)")


class ClassLoss(Loss):
    """Of scores (n, C) for labels (n,) of integers; its figure is the accuracy, in [0, 1].

    scores: C, the number of scores, 1 for two classes; magnitude >= 0: weight of the scores' own size.
    """

    figure = "accuracy"

    def __init__(self, scores: int, magnitude: float = 0.0) -> None:
        if scores < 1:
            raise GliodeError(f"loss: {scores} scores; give the number of classes, or 1 for two classes")
        if not (math.isfinite(magnitude) and magnitude >= 0):
            raise GliodeError(f"loss: magnitude must be finite and not negative, got {magnitude}")
        self.scores, self.magnitude = scores, magnitude

    @property
    def classes(self) -> int:
        return max(self.scores, 2)

    def predict(self, scores: Tensor) -> Tensor:
        """The label (n,) of each row of scores."""
        self.require_fit(scores)
        return scores.argmax(1) if self.scores > 1 else (scores[:, 0] > self.threshold()).long()

    def measure(self, outputs: Tensor, targets: Tensor) -> float:
        """The share of labels that are right."""
        return float((self.predict(outputs) == targets).double().mean())

    def require_fit(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Raise GliodeError unless scores are (n, C), and the labels, where given, (n,) and of C classes."""
        scores, labels = outputs, targets
        if scores.ndim != 2 or scores.shape[1] != self.scores:
            raise GliodeError(
                f"model: it returned scores of shape {tuple(scores.shape)}, the loss wants (n, "
                f"{self.scores}): change the last layer, or the loss's number of scores"
            )
        if labels is None:
            return
        if labels.shape != scores.shape[:1] or labels.is_floating_point():
            raise GliodeError(
                f"labels: {labels.dtype} of shape {tuple(labels.shape)} for {len(scores)} inputs; give an "
                "integer for each"
            )
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < self.classes):
            raise GliodeError(
                f"labels: from {int(labels.min())} to {int(labels.max())}, the loss has classes 0 to "
                f"{self.classes - 1}; renumber them, or give the loss more scores"
            )

    def threshold(self) -> float:
        """The one score above which label 1 is the better guess."""
        return 0.0


class SquaredLoss(ClassLoss):
    """Least squares to one-hot targets of values `off` < `on`.

    hypothesis: "sigmoid" compares sigmoid(s), None the scores themselves.
    """

    def __init__(
        self,
        scores: int,
        off: float = 0.0,
        on: float = 1.0,
        hypothesis: str | None = None,
        magnitude: float = 0.0,
    ) -> None:
        super().__init__(scores, magnitude)
        if hypothesis not in (None, "sigmoid"):
            raise GliodeError(f"loss: hypothesis {hypothesis!r} is not 'sigmoid'; give that or leave it out")
        if not (math.isfinite(off) and math.isfinite(on) and off < on):
            raise GliodeError(f"loss: targets off = {off}, on = {on}; give finite ones with off < on")
        if hypothesis == "sigmoid" and not 0 < (off + on) / 2 < 1:
            raise GliodeError(f"loss: a sigmoid is in (0, 1), targets off = {off}, on = {on} ask for others")
        self.off, self.on, self.hypothesis = off, on, hypothesis

    def targets(self, labels: Tensor, like: Tensor) -> Tensor:
        """(n, C) of off and on, in the arithmetic of `like`."""
        hot = functional.one_hot(labels, self.classes)
        hot = hot[:, 1:] if self.scores == 1 else hot
        return self.off + (self.on - self.off) * hot.to(like)

    def residual(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(h(s) - y, and sqrt(magnitude) s if there is one), (n, C) or (n, 2 C): the loss is its
        square, halved and divided by n.
        """
        self.require_fit(scores)
        value = scores if self.hypothesis is None else torch.sigmoid(scores)
        r = value - self.targets(labels, scores.detach())
        return r if not self.magnitude else torch.cat([r, math.sqrt(self.magnitude) * scores], 1)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.residual(outputs, targets).square().sum() / (2 * len(outputs))

    def threshold(self) -> float:
        middle = (self.off + self.on) / 2
        return middle if self.hypothesis is None else math.log(middle / (1 - middle))


class CrossEntropy(ClassLoss):
    """Minus the logarithm of the probability that the scores give to the label."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.require_fit(outputs)
        if self.scores > 1:
            loss = functional.cross_entropy(outputs, targets)
        else:
            loss = functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs))
        if not self.magnitude:
            return loss
        return loss + self.magnitude / 2 * outputs.square().sum() / len(outputs)
