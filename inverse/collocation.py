r"""Training networks that are solutions (solvers.node.collocation): PINN and deep Ritz, the baselines.

    J(m) = sum_k w_k mean_i 1/2 |r_k(m; z_i)|^2      residuals of an equation, misfits of data (PINN)
         + sum_k w_k mean_i e_k(m; z_i)              densities of an energy (deep Ritz)

over points z_i. The unknown m are all parameters of a model: its networks, and what is not known of the
physics. Adam first and then L-BFGS, both by `inverse.training.train`.

PINN: Raissi, Perdikaris and Karniadakis (2019). Deep Ritz: E and Yu (2018).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inverse.losses import Mean
from inverse.methods import Adam, Method, QuasiNewton
from inverse.optimizers.iteration import NonFiniteError
from inverse.training import Training, train
from solvers.errors import GliodeError


@dataclass(frozen=True)
class Term:
    """w mean_i 1/2 |r(z_i)|^2; energy: w mean_i e(z_i), with w the volume over which it is integrated.

    of: (model, points (n, k)) -> r or e, (n,) or (n, c), on the tape, row by row (a batch hands in some of
    the rows). points: all that a row needs, such as t, x and the datum there.
    """

    of: Callable[[Any, Tensor], Tensor]
    points: Tensor
    weight: float = 1.0
    energy: bool = False

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or not len(self.points) or not bool(torch.isfinite(self.points).all()):
            raise GliodeError(
                f"term: points of shape {tuple(self.points.shape)}; give rows (n, k) of finite numbers"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise GliodeError(f"term: weight must be positive and finite, got {self.weight}")


@dataclass(frozen=True)
class Fit:
    """What `fit` returns: the trainings of its two phases, and the process's seconds in all.

    stopped_by: why L-BFGS ended, "max_seconds" among others (see `inverse.training.Training`).
    """

    adam: Training
    polish: Training
    seconds: float
    stopped_by: str

    @property
    def objective(self) -> list[float]:
        """J of each epoch of both phases, before it."""
        return [entry["objective"] for entry in (*self.adam.history, *self.polish.history)]


class _Rows(nn.Module):
    """The terms as a model of rows: numbers of rows (b, 1) -> what each adds to J, times all rows, (b, 1)."""

    def __init__(self, model: nn.Module, terms: Sequence[Term]) -> None:
        super().__init__()
        self.model, self.terms = model, terms
        counts = [len(term.points) for term in terms]
        self.total = sum(counts)
        self.first = [sum(counts[:k]) for k in range(len(counts))]

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) == self.total:
            return torch.cat([self._cost(term, term.points) for term in self.terms])
        out, rows = rows.new_zeros(rows.shape), rows[:, 0].long()
        for term, first in zip(self.terms, self.first, strict=True):
            where = ((rows >= first) & (rows < first + len(term.points))).nonzero()[:, 0]
            if len(where):
                out = out.index_add(0, where, self._cost(term, term.points[rows[where] - first]))
        return out

    def _cost(self, term: Term, points: Tensor) -> Tensor:
        found = term.of(self.model, points)
        if found.shape[:1] != points.shape[:1] or found.ndim > 2:
            raise GliodeError(
                f"term: it returned shape {tuple(found.shape)} for {len(points)} points; give a row for each"
            )
        found = found.reshape(len(points), -1)
        cost = found if term.energy else found.square() / 2
        return cost.sum(1, keepdim=True) * (term.weight * self.total / len(term.points))


def fit(
    model: nn.Module,
    terms: Sequence[Term],
    *,
    adam: Adam | None = None,
    epochs: int = 1000,
    polish: int = 1000,
    memory: int = 10,
    batch: int | None = None,
    seconds: float | None = None,
    share: float = 0.3,
    seed: int = 0,
    progress: bool = False,
) -> Fit:
    """Fit the model's parameters to the terms; the model holds the result.

    epochs: of Adam (learning rate 2e-3 unless given), each over all points, or in batches of `batch`; polish:
    then iterations of L-BFGS with `memory` pairs, on all points. seconds: end when the process has spent them
    (looked at after each epoch of Adam and every 10 iterations of L-BFGS), at most the part `share` of them
    in Adam: rivals then train for equally long. seed: of the batches; a network's start has its own.

    Raises GliodeError for terms that do not fit the model; NonFiniteError where J is no longer finite, and
    GliodeError where it ends above its start: the model then holds the best parameters found, or those at the
    start.
    """
    if not terms:
        raise GliodeError("fit: no terms; give the equation's residual, and data")
    if min(epochs, polish) < 1:
        raise GliodeError(f"fit: {epochs} epochs of Adam, {polish} iterations of L-BFGS; give 1 or more")
    if seconds is not None and not (seconds > 0 and 0 < share < 1):
        raise GliodeError(f"fit: {seconds} seconds, {share} of them in Adam; give positive, a share below 1")
    own = next(model.parameters(), None)
    if own is None or any((t.points.dtype, t.points.device) != (own.dtype, own.device) for t in terms):
        raise GliodeError("fit: the points are not of the dtype and device of the model's parameters")
    begin = time.process_time()
    at_start = {name: t.detach().clone() for name, t in model.state_dict().items()}
    rows = _Rows(model, terms)
    numbers = torch.arange(rows.total, dtype=own.dtype, device=own.device)[:, None]
    labels = torch.zeros(rows.total, dtype=torch.long, device=own.device)

    def phase(method: Method, epochs: int, batch: int | None, part: float) -> Training:
        left = None if seconds is None else max(begin + part * seconds - time.process_time(), 1e-9)
        options: dict[str, Any] = {"seed": seed, "progress": progress, "max_seconds": left}
        found = train(rows, Mean(), (numbers, labels), method, epochs=epochs, batch=batch, **options)
        if found.stopped_by == "NonFinite":
            raise NonFiniteError(f"fit: {found.note}")
        if found.stopped_by == "interrupted":
            raise KeyboardInterrupt
        return found

    first = phase(adam or Adam(2e-3), epochs, batch, share)
    chunk = min(10, polish)
    last = phase(QuasiNewton(memory, chunk), math.ceil(polish / chunk), None, 1.0)
    start, end = first.history[0]["objective"], last.history[-1]["objective"]
    if end > start and batch is None:
        model.load_state_dict(at_start)
        raise GliodeError(
            f"fit: J rose from {start:.3g} to {end:.3g}; lower Adam's learning rate, or weigh the terms anew"
        )
    return Fit(first, last, time.process_time() - begin, last.stopped_by)
