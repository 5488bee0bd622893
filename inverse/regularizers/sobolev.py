r"""Sobolev seminorms: R(m) = weight / 2 <K (m - reference), m - reference>, K a symmetric stiffness matrix.

With <K a, a> = int |grad a|^2 only slopes are penalised and constants are free. For the full H1 norm, values
too, use Tikhonov in a Sobolev space.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from inverse.regularizers.interface import checked_weight
from solvers.spaces import Communicator, reduce, symmetric


class Seminorm:
    """weight / 2 <K e, e>, e = m - reference (None: zero). Called, it is on the tape to any order.

    stiffness: callable a -> K a, symmetric and positive semi-definite, free of the tape; comm: where m is
    distributed.
    """

    def __init__(
        self,
        stiffness: Callable[[Tensor], Tensor],
        weight: float = 1.0,
        reference: Tensor | None = None,
        comm: Communicator | None = None,
    ) -> None:
        self.stiffness, self.weight, self.comm = stiffness, checked_weight("Seminorm", weight), comm
        self.reference = None if reference is None else reference.detach().clone()

    def _away(self, m: Tensor) -> Tensor:
        return m if self.reference is None else m - self.reference

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor."""
        e = self._away(m)
        return 0.5 * self.weight * reduce((symmetric(e, self.stiffness) * e).sum(), self.comm)

    def gradient(self, m: Tensor) -> Tensor:
        """The dual R'(m) = weight K (m - reference)."""
        return self.weight * symmetric(self._away(m), self.stiffness)

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d = weight K d."""
        return self.weight * symmetric(d, self.stiffness)
