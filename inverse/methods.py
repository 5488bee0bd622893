"""The methods that `inverse.training.train` knows, and how each visits the problem of a batch.

ConjugateGradients, Landweber, QuasiNewton    inverse.optimizers, in the space of the parameters
Adam, SGD                                     torch.optim, on the same problems for comparison
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inverse.optimizers import conjugate_gradients, landweber, quasi_newton
from inverse.optimizers.iteration import NonFiniteError, Result, Start, Stopping
from inverse.problem import InverseProblem
from inverse.stopping import GradientTolerance, MaxIterations, State
from solvers.errors import GliodeError


@dataclass(frozen=True)
class ConjugateGradients:
    """`steps` iterations of inverse.optimizers.conjugate_gradients on each batch (full batch: an epoch)."""

    variant: str = "PR+"
    steps: int = 6

    def minimise(self, problem: InverseProblem, start: Start, stopping: Stopping) -> Result:
        return conjugate_gradients.minimise(problem, start, self.variant, stopping=stopping)


@dataclass(frozen=True)
class Landweber:
    """`steps` of gradient descent on each batch; step: as in inverse.optimizers.landweber, kept from batch to
    batch.
    """

    step: float | str = "line_search"
    steps: int = 1

    def minimise(self, problem: InverseProblem, start: Start, stopping: Stopping) -> Result:
        return landweber.minimise(problem, start, self.step, stopping=stopping)


@dataclass(frozen=True)
class QuasiNewton:
    """`steps` iterations of inverse.optimizers.quasi_newton on each batch, `memory` pairs kept."""

    memory: int = 10
    steps: int = 10

    def minimise(self, problem: InverseProblem, start: Start, stopping: Stopping) -> Result:
        return quasi_newton.minimise(problem, start, self.memory, stopping=stopping)


@dataclass(frozen=True)
class Adam:
    """One step of torch.optim.Adam a batch; cosine: lr falls to 0 as half a cosine over the run."""

    lr: float = 1e-3
    cosine: bool = False

    def optimizer(self, m: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.Adam([m], lr=self.lr)


@dataclass(frozen=True)
class SGD:
    """One step of torch.optim.SGD a batch."""

    lr: float = 0.1
    momentum: float = 0.0
    cosine: bool = False

    def optimizer(self, m: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.SGD([m], lr=self.lr, momentum=self.momentum)


OverSpaces = ConjugateGradients | Landweber | QuasiNewton
OfTorch = Adam | SGD
Method = OverSpaces | OfTorch


@dataclass(frozen=True)
class Visit:
    """What came of a batch: J before it; the rule that let no step be made; whether the user interrupted."""

    value: float
    stuck: str = ""
    interrupted: bool = False


class Stepper(ABC):
    """A method at work: the point m, and what the method remembers from one batch to the next."""

    m: Tensor
    least: int
    """Gradients that a visit takes at least."""

    @abstractmethod
    def visit(self, problem: InverseProblem, left: float) -> Visit:
        """Work on a batch, for at most `left` gradients. Raises NonFiniteError."""

    @abstractmethod
    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and plain values, that `restore` takes."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on as if `memory` had just been asked, at the present m."""


def stepper(method: Method, m: Tensor, visits: int, full: bool) -> Stepper:
    """For a run of `visits` batches, or with the full batch. Raises GliodeError for senseless numbers."""
    if isinstance(method, OverSpaces):
        if method.steps < 1:
            raise GliodeError(f"{type(method).__name__}: steps must be 1 or more, got {method.steps}")
        return _OverSpaces(method, m, full or isinstance(method, Landweber))
    if not (math.isfinite(method.lr) and method.lr > 0):
        raise GliodeError(f"{type(method).__name__}: lr must be positive and finite, got {method.lr}")
    return _OfTorch(method, m, visits)


class _OverSpaces(Stepper):
    """`minimise` on each batch's problem; carry: its memory (direction, pairs, step) goes on to the next."""

    least = 2  # one at the start, one after the first step

    def __init__(self, method: OverSpaces, m: Tensor, carry: bool) -> None:
        self.method, self.m, self.carry = method, m, carry
        self._saved: dict[str, NDArray[Any]] = {}

    def visit(self, problem: InverseProblem, left: float) -> Visit:
        start: Start = self.m if not self._saved else {**self._saved, "m": self.m.cpu().numpy()}
        before = len(self._saved["history"]) - 1 if self._saved else 0
        done = int(self._saved["history"][-1][0]) if self._saved else 0

        def budget(state: State) -> dict[str, float] | None:
            spent = problem.counts["adjoint"]
            return {"gradients": float(spent)} if spent >= left else None

        small = GradientTolerance(torch.finfo(self.m.dtype).eps ** (2 / 3))
        rules = (small, MaxIterations(done + self.method.steps), budget)
        result = self.method.minimise(problem, start, rules)
        self.m = result.m.to(self.m.device)
        if self.carry:
            saved = result.state_dict()
            saved["history"] = saved["history"][[0, -1]]  # all that a resumed run looks at
            self._saved = {name: array for name, array in saved.items() if name != "m"}
        return Visit(
            value=result.history[before]["value"],
            stuck=result.stopped_by if result.iterations == done else "",
            interrupted=result.stopped_by == "interrupted",
        )

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        text = {k: v.tolist() for k, v in self._saved.items() if v.dtype.kind == "U"}
        return {k: torch.from_numpy(v) for k, v in self._saved.items() if k not in text}, text

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self._saved = {k: np.array(v) for k, v in values.items()} | {k: t.numpy() for k, t in tensors.items()}


class _OfTorch(Stepper):
    """A torch optimizer on the flat point, which is what it would do on its parts: all act entry by entry."""

    least = 1

    def __init__(self, method: OfTorch, m: Tensor, visits: int) -> None:
        self.method, self.visits, self.done = method, visits, 0
        self.m = self._leaf = nn.Parameter(m.detach().clone())
        self.optimizer = method.optimizer(self._leaf)

    def visit(self, problem: InverseProblem, left: float) -> Visit:
        value, self._leaf.grad = problem.value_and_gradient(self._leaf)
        if not math.isfinite(value):
            raise NonFiniteError(f"objective: value {value}; lower the learning rate")
        if self.method.cosine:
            share = min(self.done / self.visits, 1.0)
            self.optimizer.param_groups[0]["lr"] = self.method.lr * (1 + math.cos(math.pi * share)) / 2
        self.optimizer.step()
        self.done += 1
        return Visit(value)

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.optimizer.state_dict()["state"].get(0, {})
        return {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}, {"done": self.done}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.done = values["done"]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: tensors} if tensors else {}, "param_groups": groups})
