"""Exchange of shared degrees of freedom, on the tape.

Under MPI a state holds the rank's owned dofs. `extend` (owned -> owned and ghosts) and `gather` (sum the
ghosts' contributions into their owners) are adjoint to each other, so each is the other's derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


class Ghosts:
    """The exchange for one space. Local arrays hold the owned values first, then the ghosts.

    Each rank tells the owners once which of their values it needs; an exchange then moves nothing else.
    """

    def __init__(self, V: dolfinx.fem.FunctionSpace) -> None:
        index_map, self._comm = V.dofmap.index_map, V.mesh.comm
        self.n_owned = int(index_map.size_local)
        self.n_local = self.n_owned + int(index_map.num_ghosts)
        self.parallel = self._comm.size > 1
        owners = np.asarray(index_map.owners)
        places = [np.flatnonzero(owners == rank) for rank in range(self._comm.size)]
        wanted = self._comm.alltoall([np.asarray(index_map.ghosts)[place] for place in places])
        # By neighbour: the ghosts it owns, and the owned values it wants, as local numbers.
        self._ghosts = {r: self.n_owned + place for r, place in enumerate(places) if len(place)}
        self._shared = {r: w - index_map.local_range[0] for r, w in enumerate(wanted) if len(w)}

    def fill(self, local: Array) -> None:
        """Set the ghosts of a local array from their owners, in place."""
        for place, values in self._exchange(local, self._shared, self._ghosts):
            local[place] = values

    def send_back(self, local: Array) -> Iterator[tuple[Array, Array]]:
        """The ghosts' values, at their owners: (owned numbers, values to add there) by neighbour."""
        return self._exchange(local, self._ghosts, self._shared)

    def _exchange(
        self, local: Array, outward: dict[int, Array], inward: dict[int, Array]
    ) -> Iterator[tuple[Array, Array]]:
        arriving = {rank: np.empty(len(place)) for rank, place in inward.items()}
        leaving = {rank: local[place] for rank, place in outward.items()}
        requests = [self._comm.Irecv(buffer, rank) for rank, buffer in arriving.items()]
        requests += [self._comm.Isend(buffer, rank) for rank, buffer in leaving.items()]
        MPI.Request.Waitall(requests)
        for rank, place in inward.items():
            yield place, arriving[rank]

    def extend(self, u: Tensor) -> Tensor:
        """Owned values to owned and ghost values."""
        return _Extend.apply(u, self) if self.parallel else u

    def gather(self, local: Tensor) -> Tensor:
        """Local contributions to owned sums."""
        return _Gather.apply(local, self) if self.parallel else local

    def _forward(self, u: Tensor) -> Tensor:
        local = np.empty(self.n_local)
        local[: self.n_owned] = u.detach().numpy()
        self.fill(local)
        return torch.from_numpy(local)

    def _reverse(self, local: Tensor) -> Tensor:
        values = local.detach().numpy()
        owned = values[: self.n_owned].copy()
        for place, more in self.send_back(values):
            owned[place] += more
        return torch.from_numpy(owned)


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ghosts: Ghosts) -> Tensor:
        ctx.ghosts = ghosts
        return ghosts._forward(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.ghosts), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Extend.apply(tangents[0], ctx.ghosts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, ghosts: Ghosts) -> Tensor:
        ctx.ghosts = ghosts
        return ghosts._reverse(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Extend.apply(grads[0], ctx.ghosts), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Gather.apply(tangents[0], ctx.ghosts)
