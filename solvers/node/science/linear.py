r"""The right-hand side of a saved problem, M x' = A(w) x + b(w), as a field for any integrator.

What is not linear is added by hand: a nodal reaction to x' itself, lambda t, x, rho: f(t, x) + rho * x *
(1 - x), a dual one N(x; w) through f.inverse(N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.science.implicit import Resolvent
from solvers.node.science.sparse import Stiffness, agree, product
from solvers.semidiscrete import SemiDiscrete


class Linear:
    """f(t, x, **weights) = M^-1 (sum_k w_k A_k x + sum_k w_k b_k - K(conductances) x), of a problem.

    weights: by the name of an operator or a load, a number, or (batch, 1) for one of each state; 1 where not
    given. `conductances`: (pairs,) or (batch, pairs); those of D = 1 everywhere where not given. A field for
    `integrate`, with the weights to be found among its parameters, and for `ScienceActivated`. inverse: b ->
    M^-1 b on the tape.

    Raises GliodeError for unknown names, and for states or weights of another size, device or type than the
    problem's.
    """

    def __init__(self, problem: SemiDiscrete) -> None:
        self.problem, self.inverse = problem, Resolvent(problem.mass)
        self.stiffness: Stiffness | None = None
        self._known = {*problem.operators, *problem.loads}
        if problem.conductances is not None:
            pairs = problem.conductances
            self._known.add("conductances")
            self.stiffness = Stiffness(pairs)
            one = torch.eye(pairs.table.shape[-1]) if pairs.tensor else torch.ones(())
            self._unit = pairs(one.to(pairs.table).expand(pairs.n_cells, *one.shape))

    def __call__(self, t: Tensor | float, x: Tensor, **weights: Tensor | float) -> Tensor:
        """x', (..., n)."""
        problem, other = self.problem, sorted(set(weights) - self._known)
        if other:
            raise GliodeError(f"weights: {other} are not among {', '.join(sorted(self._known))}")
        agree(self.inverse.diagonal, x, problem.n)
        dual = torch.zeros_like(x)
        for name, A in problem.operators.items():
            dual = dual + weights.get(name, 1.0) * product(A, x)
        for name, b in problem.loads.items():
            dual = dual + weights.get(name, 1.0) * b
        if self.stiffness is not None:
            w = weights.get("conductances", self._unit)
            if not isinstance(w, Tensor):
                raise GliodeError("conductances: a number; give the weights of the pairs, conductances(D)")
            dual = dual - self.stiffness(w, x)
        return self.inverse(dual)
