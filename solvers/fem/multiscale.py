"""`Scales` of a domain: smoothing at lengths in mm, and slopes, of batches of fields on any mesh.

    energy.on(Multiscale(domain, energy.lengths))    a learned energy of a mesh (inverse.regularizers.learned)

The lengths are in mm and the integrals exact for the fields of the mesh (on bricks by the vertex rule), so
that what is trained on one mesh means the same on another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI
from scipy import sparse

from solvers.fem.gradients import _tables
from solvers.fem.mesh import Domain
from solvers.fem.spaces import lumped
from solvers.scales import Scales


class Multiscale(Scales):
    """S_l = (M + l^2 K)^-1 M for `lengths` in mm and the slopes of `Gradient`: fields (batch, owned dofs).

    Beyond some 10 000 dofs its work grows as the largest length over the smallest cell. Under MPI every rank
    calls it with the same batch. Raises GliodeError for lengths that do not rise, and for a surface embedded
    in space.
    """

    def __init__(self, domain: Domain, lengths: Sequence[float], rtol: float = 1e-8) -> None:
        self.domain = domain
        slopes, weights, bound = _tables(domain)
        cells, points = domain.n_cells, weights.shape[1]
        vertices, d = slopes.shape[2:]
        values = np.broadcast_to(slopes.transpose(3, 0, 1, 2), (d, cells, points, vertices))
        columns = np.broadcast_to(domain.cell_dofs[:, None, :].astype(np.int32), values.shape)
        pointers = np.arange(0, values.size + 1, vertices)
        shape = (d * cells * points, len(domain.points))
        D = sparse.csr_array((values.ravel(), columns.ravel(), pointers), shape, copy=True)
        D.data[np.abs(D.data) < 1e-13 * np.abs(D.data).max(initial=0)] = 0  # rounded zeros of bricks
        D.eliminate_zeros()
        w = np.broadcast_to(weights, (cells, points)).ravel().copy()
        top = domain.comm.allreduce(float(bound.max(initial=0)) if cells else 0.0, op=MPI.MAX)
        super().__init__(lumped(domain), D, torch.from_numpy(w), top, lengths, rtol, domain.ghosts)
