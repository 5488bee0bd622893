"""A source of a few points: each a seed of the model's width, of unknown place and amplitude."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.uncertainty import Laplace
from solvers.fem.spd import thin_axis
from solvers.spaces import Euclidean, replicate
from tumour.source import SourceProblem
from tumour.source_foci import Focus

SPREAD, SPREAD_LOG = 20.0, 3.0
"""Prior standard deviations: mm about where a start puts a point, and of the logarithm of its amplitude."""

LARGEST = 1.0
"""A density is at most the carrying capacity."""


class Points:
    """m = (x, y, z, log amplitude) of each point, in the region's box; a slab fixes the place across it."""

    def __init__(self, problem: SourceProblem, count: int) -> None:
        self._problem, self.count = problem, count
        self._model = problem.growing.model
        affine, axis = problem.anatomy.affine, thin_axis(problem.domain)
        corners = np.argwhere(problem.region) @ affine[:3, :3].T + affine[:3, 3]
        self._low, self._high = corners.min(0), corners.max(0)
        self.fixed = None if axis is None else int(np.abs(affine[:3, axis]).argmax())
        self._middle = corners.mean(0)
        free = [k for k in range(3) if k != self.fixed]
        self._names = [f"{'xyz'[k]}" for k in free] + ["amplitude"]
        self._free = torch.tensor(free)
        self.size = count * len(self._names)
        self.names = [f"{name}{i + 1}" for i in range(count) for name in self._names]
        scale = torch.tensor([SPREAD] * len(free) + [SPREAD_LOG], dtype=torch.float64).repeat(count)
        self.space = Euclidean(self.size, scale)

    def _places(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (count, 3) and logarithms of amplitudes (count,), on the tape."""
        rows = m.view(self.count, -1)
        centres = torch.from_numpy(self._middle).repeat(self.count, 1)
        return centres.index_copy(1, self._free, rows[:, :-1]), rows[:, -1]

    def source(self, m: Tensor) -> Tensor:
        """u(0), (owned dofs,)."""
        centres, logs = self._places(replicate(m, self._model.domain.comm))
        each = [self._model.seed_state(centre) * log.exp() for centre, log in zip(centres, logs, strict=True)]
        return torch.stack(each).sum(0) / self._model.seed.amplitude

    def start(self, centres: np.ndarray, cells: np.ndarray) -> Tensor:
        """m of points at centres (count, 3), each with as many cells as a focus has."""
        width = self._model.seed.width
        full = (2 * np.pi) ** 1.5 * width**3
        amplitude = np.clip(cells / full, 0.01, 0.5 * LARGEST)
        inside = np.clip(centres, self._low, self._high)[:, self._free.numpy()]
        return torch.from_numpy(np.column_stack([inside, np.log(amplitude)])).reshape(-1)

    def problem(self, defect: Tensor) -> LeastSquares:
        """White residuals with a wide Gaussian prior about the middle of the region; data less a defect."""
        p = self._problem
        middle = self.start(np.tile(self._middle, (self.count, 1)), np.zeros(self.count))
        low, high = (
            torch.tensor([*side[self._free.numpy()], edge], dtype=torch.float64).repeat(self.count)
            for side, edge in ((self._low - 1.0, -20.0), (self._high + 1.0, np.log(LARGEST)))
        )
        return LeastSquares(
            self.space,
            lambda m: p.growing.images(self.source(m)),
            p.data - defect,
            p.sd,
            regularizer=Tikhonov(self.space, reference=middle),
            bounds=(low, high),
        )

    def posterior(self, m: Tensor, jacobian: Tensor) -> Laplace:
        """The Gaussian posterior of m."""
        logs = [name for name in self.names if name.startswith("amplitude")]
        return Laplace(m, jacobian, self.space.scale, self.names, logs)

    def foci(self, m: Tensor) -> list[Focus]:
        """The points, those of most cells first."""
        with torch.no_grad():
            centres, logs = self._places(m)
            each = [self._model.seed_state(c) * log.exp() for c, log in zip(centres, logs, strict=True)]
            cells = [self._model.domain.integral(u) / self._model.seed.amplitude for u in each]
        found = [
            Focus((float(c[0]), float(c[1]), float(c[2])), n, float(log.exp()))
            for c, n, log in zip(centres, cells, logs, strict=True)
        ]
        return sorted(found, key=lambda focus: -focus.cells)


def starts_of(points: Points, candidates: list[Focus], most: int) -> list[Tensor]:
    """Starts from foci of a field: the sets of them that hold most cells.

    Where there are fewer than points, the largest is split, half of it each side of its centre.
    """
    places = [(np.array(focus.centre), focus.cells) for focus in candidates]
    axis = 0
    while len(places) < points.count:
        (centre, cells), *rest = sorted(places, key=lambda place: -place[1])
        axis = axis + 1 if axis == points.fixed else axis
        shift = np.eye(3)[axis % 3] * 5.0
        places = [(centre - shift, cells / 2), (centre + shift, cells / 2), *rest]
        axis += 1
    sets = sorted(combinations(places, points.count), key=lambda chosen: -sum(c for _, c in chosen))
    return [
        points.start(np.array([p for p, _ in chosen]), np.array([c for _, c in chosen]))
        for chosen in sets[:most]
    ]
