r"""Losses of a classifier's scores s (n, C) for labels (n,): means over the n inputs.

    SquaredLoss     1/(2n) sum_i |h(s_i) - y_i|^2,    h the identity or the sigmoid, y one-hot: off or on
    CrossEntropy    -1/n sum_i log p_i,    p = softmax(s) at the label
    both            + magnitude/2 1/n sum_i |s_i|^2, which keeps scores small

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
    """loss(scores, labels) -> a 0-d tensor on the tape, twice differentiable.

    scores: C, the number of scores, 1 for two classes; magnitude >= 0: weight of the scores' own size.
    """

    def __init__(self, scores: int, magnitude: float = 0.0) -> None:
        if scores < 1:
            raise GliodeError(f"loss: {scores} scores; give the number of classes, or 1 for two classes")
        if not (math.isfinite(magnitude) and magnitude >= 0):
            raise GliodeError(f"loss: magnitude must be finite and not negative, got {magnitude}")
        self.scores, self.magnitude = scores, magnitude

    @property
    def classes(self) -> int:
        return max(self.scores, 2)

    @abstractmethod
    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch: scores (n, C), labels (n,) of integers."""

    def predict(self, scores: Tensor) -> Tensor:
        """The label (n,) of each row of scores."""
        self.require_fit(scores)
        return scores.argmax(1) if self.scores > 1 else (scores[:, 0] > self.threshold()).long()

    def accuracy(self, scores: Tensor, labels: Tensor) -> float:
        """The share of labels that are right, in [0, 1]."""
        return float((self.predict(scores) == labels).double().mean())

    def require_fit(self, scores: Tensor, labels: Tensor | None = None) -> None:
        """Raise GliodeError unless scores are (n, C), and the labels, where given, (n,) and of C classes."""
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


class SquaredLoss(Loss):
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

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.residual(scores, labels).square().sum() / (2 * len(scores))

    def threshold(self) -> float:
        middle = (self.off + self.on) / 2
        return middle if self.hypothesis is None else math.log(middle / (1 - middle))


class CrossEntropy(Loss):
    """Minus the logarithm of the probability that the scores give to the label."""

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        self.require_fit(scores)
        if self.scores > 1:
            loss = functional.cross_entropy(scores, labels)
        else:
            loss = functional.binary_cross_entropy_with_logits(scores[:, 0], labels.to(scores))
        return loss if not self.magnitude else loss + self.magnitude / 2 * scores.square().sum() / len(scores)
