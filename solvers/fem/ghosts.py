"""Exchange of shared degrees of freedom, on the tape.

Under MPI a state holds the rank's owned dofs. `extend` (owned -> owned and ghosts) and `gather` (sum the
ghosts' contributions into their owners) are adjoint to each other, so each is the other's derivative.
"""

from __future__ import annotations

from typing import Any

import dolfinx
import torch
from torch import Tensor


class Ghosts:
    """The exchange for one space."""

    def __init__(self, V: dolfinx.fem.FunctionSpace) -> None:
        self._vector = dolfinx.la.vector(V.dofmap.index_map, 1)
        self.n_owned = int(V.dofmap.index_map.size_local)
        self.parallel = V.mesh.comm.size > 1

    def extend(self, u: Tensor) -> Tensor:
        """Owned values to owned and ghost values."""
        return _Extend.apply(u, self) if self.parallel else u

    def gather(self, local: Tensor) -> Tensor:
        """Local contributions to owned sums."""
        return _Gather.apply(local, self) if self.parallel else local

    def _forward(self, u: Tensor) -> Tensor:
        array = self._vector.array
        array[: self.n_owned] = u.detach().numpy()
        self._vector.scatter_forward()
        return torch.from_numpy(array.copy())

    def _reverse(self, local: Tensor) -> Tensor:
        array = self._vector.array
        array[:] = local.detach().numpy()
        self._vector.scatter_reverse(dolfinx.la.InsertMode.add)
        return torch.from_numpy(array[: self.n_owned].copy())


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
