r"""How sure: the Laplace posterior of a few parameters, all its matrices dense.

With J (N, n) the Jacobian of the whitened residuals at the estimate and P the prior covariance,

    posterior covariance  S = (J^T J + P^-1)^-1,

exact for a linear forward map with Gaussian noise and prior. The generalised eigenproblem J^T J w = lambda
P^-1 w gives the combinations c = P^-1 w of the parameters, independent of each other before and after the
data, with

    posterior variance of c . m / prior variance of c . m  =  1 / (1 + lambda);

lambda is the information in the data relative to the prior's. A combination counts as fixed by the data where
the ratio of variances is at most 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from scipy.special import ndtri
from torch import Tensor

from inverse.uncertainty.model_error import ModelError
from solvers.errors import GliodeError
from solvers.spaces import Communicator, reduce

FIXED = 0.1  # posterior over prior variance


@dataclass(frozen=True)
class Combination:
    """A combination of parameters, largest coefficient 1.

    text: it in words, terms below a tenth of the largest effect (coefficient times prior sd) left out;
    coefficients: all of them; information: lambda, data over prior; variance_ratio: posterior over prior
    variance, 1 / (1 + lambda); sd: its posterior standard deviation; fixed: variance_ratio <= 0.1.
    """

    text: str
    coefficients: dict[str, float]
    information: float
    variance_ratio: float
    sd: float
    fixed: bool


class Laplace:
    """The Gaussian posterior N(mean, covariance) of n parameters around an estimate.

    mean: (n,); jacobian: (N, n) of the whitened residuals there, `LeastSquares.jacobian(m)` (which contains
    that problem's own model_error); prior: (n,) standard deviations or an (n, n) covariance, the one the
    estimate was made with; names: of the n parameters; log: the names of those that are logarithms, whose
    values and intervals are reported mapped back by exp; model_error: E (N, k) for a Jacobian whitened by the
    noise alone; comm: where the rows are distributed.
    """

    def __init__(
        self,
        mean: Tensor,
        jacobian: Tensor,
        prior: Tensor,
        names: Sequence[str],
        log: Collection[str] = (),
        model_error: Tensor | None = None,
        comm: Communicator | None = None,
    ) -> None:
        n = len(names)
        if (
            mean.shape != (n,)
            or jacobian.ndim != 2
            or jacobian.shape[1] != n
            or prior.shape not in ((n,), (n, n))
        ):
            raise GliodeError(
                f"Laplace: {n} names, but mean {tuple(mean.shape)}, jacobian {tuple(jacobian.shape)}, "
                f"prior {tuple(prior.shape)}; needed ({n},), (N, {n}), ({n},) or ({n}, {n})"
            )
        if not set(log) <= set(names):
            raise GliodeError(f"Laplace: log names {sorted(set(log) - set(names))} are no parameters")
        self.mean, self.names, self.log = mean.detach(), list(names), set(log)
        self.prior_covariance = torch.diag(prior.square()) if prior.ndim == 1 else prior
        root, failed = torch.linalg.cholesky_ex(self.prior_covariance)
        if int(failed) or not bool(torch.isfinite(jacobian).all()):
            raise GliodeError("Laplace: the prior must be positive definite and the Jacobian finite")
        jacobian = jacobian.detach()
        if model_error is not None:
            jacobian = ModelError(model_error, comm).whiten(jacobian)
        information = root.mT @ reduce(jacobian.mT @ jacobian, comm) @ root
        values, vectors = torch.linalg.eigh(information)
        self.information, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
        spread = (root @ vectors) / (1 + self.information).sqrt()
        self.covariance = spread @ spread.mT
        self.sd = self.covariance.diagonal().sqrt()
        self._combinations = torch.linalg.solve_triangular(root.mT, vectors, upper=True)  # columns P^-1 w

    def estimates(self) -> dict[str, float]:
        """{name: value}, logarithms mapped back (their median)."""
        return {name: self._value(name, float(x)) for name, x in zip(self.names, self.mean, strict=True)}

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """{name: (low, high)}, central credible intervals at a level in (0, 1), logarithms mapped back."""
        if not 0 < level < 1:
            raise GliodeError(f"Laplace: the level must lie between 0 and 1, got {level}")
        z = float(ndtri(0.5 + level / 2))
        return {
            name: (self._value(name, float(x - z * sd)), self._value(name, float(x + z * sd)))
            for name, x, sd in zip(self.names, self.mean, self.sd, strict=True)
        }

    def identifiability(self) -> list[Combination]:
        """The n independent combinations, best determined first."""
        prior_sd = self.prior_covariance.diagonal().sqrt()
        found = []
        for information, c in zip(self.information.tolist(), self._combinations.mT, strict=True):
            effect = (c * prior_sd).abs()
            c = c / c[effect.argmax()]
            ratio = 1 / (1 + information)
            found.append(
                Combination(
                    text=self._text(c, effect / effect.max()),
                    coefficients=dict(zip(self.names, c.tolist(), strict=True)),
                    information=information,
                    variance_ratio=ratio,
                    sd=math.sqrt(float(c @ self.covariance @ c)),
                    fixed=ratio <= FIXED,
                )
            )
        return found

    def report(self, level: float = 0.9) -> str:
        """Estimates with intervals, and which combinations the data fix, as text."""
        intervals = self.intervals(level)
        width = max(len(name) for name in self.names)
        lines = [f"{'':{width}}  {'estimate':>11}  {100 * level:g} % interval"]
        for name, value in self.estimates().items():
            low, high = intervals[name]
            lines.append(f"{name:{width}}  {value:11.4g}  [{low:.4g}, {high:.4g}]")
        for c in self.identifiability():
            verdict = "fixed by the data" if c.fixed else "not fixed by the data"
            lines.append(f"{c.text}: {verdict} (posterior / prior variance {c.variance_ratio:.2g})")
        return "\n".join(lines)

    def _value(self, name: str, x: float) -> float:
        return math.exp(x) if name in self.log else x

    def _text(self, c: Tensor, effect: Tensor) -> str:
        text = ""
        for i in effect.argsort(descending=True, stable=True).tolist():
            if effect[i] < 0.1:
                break
            name = f"log {self.names[i]}" if self.names[i] in self.log else self.names[i]
            size = f"{abs(float(c[i])):.2g}"
            term = name if size == "1" else f"{size} {name}"
            sign = ("-" if c[i] < 0 else "") if not text else (" - " if c[i] < 0 else " + ")
            text += sign + term
        return text
