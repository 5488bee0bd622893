r"""A learned regularizer of fields on any mesh: potentials of smoothed values and of smoothed slopes.

    R(m) = sum_c w_c int psi_c(a_c(m)(x) - s_c) dx + sum_c w_c int psi_c(|grad b_c(m)|(x)) dx,
    a_c(m), b_c(m) = sum_k mix_ck B_k m,   B_k = S_k - S_(k+1),   B_last = S_last,   S_k = (M + l_k^2 K)^-1 M

at lengths l_k in mm: filters in units of length, not of cells, so that trained weights mean the same on any
mesh and at any resolution. Trained are the weights w, the mixing, the shapes of the potentials and, where
`uneven`, the shifts s of the values. Smoothed total variation (one slope of S_0 = 1 with a sharp psi), H1 (a
quadratic one), sparsity (one value with a sharp psi) and their sums are all of this form: training starts
from one. Integrals are by the lumped mass at the vertices and by the quadrature of the slopes.

Guarantee, in L2 with the lumped mass. All B_k are functions of A = M^-1 K, so with f_k the symbol of S_k, p_c
and q_c those of a_c and b_c, and psi_c'' in [-low_c, high_c] (and with it psi'(t)/t: psi is even)

    Lipschitz <= sup_t sum_c w_c high_c p_c(t)^2 + t sum_c w_c high_c q_c(t)^2,    t in [0, bound of A],

and the same with low_c for the modulus: one dimension, bounded by intervals. For l > 0,
t f_l(t)^2 <= 1/(4 l^2) whatever the mesh; only slopes of m itself (l = 0) need its bound, ~ 12 / h^2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from inverse.regularizers.learned.energy import Energy, Guarantee
from inverse.regularizers.learned.potentials import POTENTIALS, Potential
from solvers.errors import GliodeError
from solvers.scales import checked_lengths
from solvers.spaces import Diagonal, reduce, replicate

_TINY = 1e-24  # of |grad|^2: an even psi has no slope where it is 0
_INTERVALS = 4000
_FAR = 1e6  # beyond this over the shortest length squared, one interval


class FieldOperators(Protocol):
    """Of a mesh: solvers.scales.Scales, made of a domain by solvers.fem.multiscale.Multiscale.

    space: L2 with the lumped mass; lengths: l_k; weights: of the points of the slopes; bound: above the
    spectrum of A; rtol: of the smoothing.
    """

    space: Diagonal
    lengths: tuple[float, ...]
    weights: Tensor
    bound: float
    rtol: float

    def smooth(self, m: Tensor, /) -> Tensor:
        """S_k m, (batch, lengths, n), of m (batch, n)."""
        ...

    def smooth_adjoint(self, duals: Tensor, /) -> Tensor:
        """sum_k S_k^T y_k, (batch, n), of duals (batch, lengths, n)."""
        ...

    def slopes(self, m: Tensor, /) -> Tensor:
        """grad m, (..., d, points)."""
        ...

    def slopes_adjoint(self, q: Tensor, /) -> Tensor:
        """The transpose of that, (..., n)."""
        ...


Term = Sequence[float]
"""(weight, length, edge): the start of one channel, near weight int |S_length m| or |grad S_length m|.

Below `edge` (in units of m, of a slope per mm) the modulus is rounded, to weight |.|^2 / (2 edge) or so: a
small edge is sparsity or total variation, one above all that occurs L2 or H1.
"""


class MeshRidge(Energy):
    """R(m) of fields (batch, n) of the mesh it is `on`.

    lengths: rising, in mm, 0 for no smoothing; slopes, values: their channels, by the terms at which training
    starts; potential: a name of POTENTIALS, with its `options`; uneven: shift the values by trained
    constants; noise: of the mixing at the start, in which channels of one term differ. Raises GliodeError for
    terms, lengths or potentials that are none.
    """

    def __init__(
        self,
        lengths: Sequence[float] = (0.0, 4.0, 8.0, 16.0),
        slopes: Sequence[Term] = ((1.0, 0.0, 0.01),),
        values: Sequence[Term] = (),
        potential: str = "log_cosh",
        uneven: bool = False,
        noise: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.lengths = checked_lengths(lengths)
        if potential not in POTENTIALS:
            raise GliodeError(f"mesh ridge: potential {potential!r} is not one of {', '.join(POTENTIALS)}")
        terms = [tuple(map(float, term)) for term in (*values, *slopes)]
        if not terms:
            raise GliodeError("mesh ridge: give at least one term of slopes or values")
        for term in terms:
            if len(term) != 3 or not (term[0] > 0 and term[1] in self.lengths and term[2] > 0):
                raise GliodeError(
                    f"mesh ridge: term {term}: give (weight, length, edge), weight and edge positive, the "
                    f"length one of {list(self.lengths)}"
                )
        self._said = {
            "lengths": list(self.lengths),
            "slopes": [list(map(float, term)) for term in slopes],
            "values": [list(map(float, term)) for term in values],
            "potential": potential,
            "uneven": uneven,
            "noise": noise,
            **options,
        }
        self.n_values, count = len(values), len(terms)
        mix = torch.tensor([[1.0 if length >= term[1] else 0.0 for length in self.lengths] for term in terms])
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(mix + noise * torch.randn(mix.shape, generator=generator))
        self.of_values, self.of_slopes, one = (
            POTENTIALS[potential](n, **options) for n in (self.n_values, count - self.n_values, 1)
        )
        self.edge = torch.tensor([term[2] for term in terms], dtype=torch.float64)
        weight = torch.tensor([term[0] for term in terms])
        steepest = float(one.slope(torch.linspace(0, 10, 101)[None, None]).max())
        self.log_weight = nn.Parameter((weight * self.edge.float() / steepest).log())
        self.shift = nn.Parameter(torch.zeros(self.n_values)) if uneven else None
        self.operators: FieldOperators | None = None

    def settings(self) -> dict[str, Any]:
        """What makes it again; the operators are none of it."""
        return copy.deepcopy(self._said)

    def on(self, operators: FieldOperators) -> MeshRidge:
        """The same weights (shared, not copied) on a mesh.

        Raises GliodeError where its lengths are others.
        """
        if tuple(operators.lengths) != self.lengths:
            raise GliodeError(
                f"mesh ridge: trained at lengths {list(self.lengths)} mm, the mesh's operators have "
                f"{list(operators.lengths)}: make them with energy.lengths"
            )
        bound = copy.copy(self)
        bound.operators = operators
        return bound

    @property
    def metric(self) -> Diagonal:
        """The space of the guarantee: L2 of the mesh with the lumped mass."""
        return self._mesh().space

    def require_fit(self, shape: tuple[int, ...]) -> None:
        """Raise GliodeError unless it is on a mesh and fields of this shape are of it."""
        space = self._mesh().space
        if tuple(shape) != space.shape:
            raise GliodeError(
                f"mesh ridge: fields of shape {tuple(shape)}, its mesh has {space.shape}: bind it to theirs, "
                "energy.on(Multiscale(domain, energy.lengths))"
            )

    def _mesh(self) -> FieldOperators:
        if self.operators is None:
            raise GliodeError(
                "mesh ridge: not on a mesh yet; take energy.on(Multiscale(domain, energy.lengths)) "
                "(solvers.fem.multiscale)"
            )
        return self.operators

    def forward(self, x: Tensor) -> Tensor:
        """R(x), (batch,), of x (batch, n), the same on every rank."""
        if (
            torch.is_grad_enabled()
            and x.requires_grad
            and not any(p.requires_grad for p in self.parameters())
        ):
            out: Tensor = _Frozen.apply(x, self)
            return out
        return self._evaluated(x, False)[0]

    def gradient(self, x: Tensor) -> Tensor:
        """The dual R'(x), (batch, n): by the chain rule, on the tape where grad mode is on."""
        return self._evaluated(x, True)[1]

    def _evaluated(self, x: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        """R(x), and the dual where `both` (else nothing)."""
        mesh = self._mesh()
        if x.ndim != 2 or x.shape[1:] != mesh.space.shape:
            raise GliodeError(f"mesh ridge: fields {tuple(x.shape)}, expected (batch, {mesh.space.size})")
        comm, n = mesh.space.comm, self.n_values
        mix, weights = (replicate(p, comm).to(x) for p in (self._mixing(), self.log_weight.exp()))
        channels = mix @ mesh.smooth(x)
        value, duals = x.new_zeros(len(x)), []
        if n:
            a, mass = channels[:, :n], mesh.space.weights.to(x)
            if self.shift is not None:
                a = a - replicate(self.shift, comm).to(x)[:, None]
            psi, slope = self._potential(self.of_values, a)
            value = value + (psi @ mass) @ weights[:n]
            duals.append(weights[:n, None] * slope * mass)
        if n < len(weights):
            q, points = mesh.slopes(channels[:, n:]), mesh.weights.to(x)
            size = (q.square().sum(-2) + _TINY).sqrt()
            psi, slope = self._potential(self.of_slopes, size)
            value = value + (psi @ points) @ weights[n:]
            if both:
                pull = slope / size * weights[n:, None] * points
                duals.append(mesh.slopes_adjoint(pull[..., None, :] * q))
        dual = mesh.smooth_adjoint(mix.T @ torch.cat(duals, 1)) if both else x.new_zeros(0)
        return reduce(value, comm), dual

    def _potential(self, potential: Potential, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi(t) and psi'(t); of the trained shapes every rank's part counts."""
        comm = self._mesh().space.comm
        if comm is None:
            return potential.value_and_slope(t)
        shapes = {name: replicate(p, comm) for name, p in potential.named_parameters()}
        found: tuple[Tensor, Tensor] = functional_call(
            _Both(potential), {f"of.{k}": p for k, p in shapes.items()}, (t,)
        )
        return found

    def _mixing(self) -> Tensor:
        """Of the S_k instead of the B_k, over the edges: (channels, lengths)."""
        steps = torch.cat([self.mix[:, :1], self.mix.diff(dim=1)], 1)
        return steps / self.edge.to(steps)[:, None]

    def guarantee(self) -> Guarantee:
        """In `metric`; before it is on a mesh, for any mesh, however fine."""
        w = self.log_weight.detach().double().exp()
        low, high = (
            w * torch.cat([a, b]).detach().double()
            for a, b in zip(self.of_values.curvature(), self.of_slopes.curvature(), strict=True)
        )
        top, least = self._symbols()
        far = torch.full((1, self.n_values, 1), 1e12, dtype=torch.float64)
        with torch.no_grad():
            rising = bool((self.of_values.slope(far) > 0).all())  # of all potentials there are, thence on
        coercive = self.n_values > 0 and rising and bool((least > 0).all())
        return Guarantee(_worst(low, top), _worst(torch.maximum(low, high), top), coercive)

    def _symbols(self) -> tuple[Tensor, Tensor]:
        """Upper bounds of p_c^2 and t q_c^2, (channels, intervals), and lower ones of the largest |p_c|."""
        bound, slack = math.inf, 0.0
        if self.operators is not None:
            bound, slack = self.operators.bound, self.operators.rtol
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        scale = float(lengths[lengths > 0].min()) if bool((lengths > 0).any()) else 1.0
        last = min(bound, _FAR / scale**2)
        t = torch.logspace(math.log10(1e-6 * last / _FAR), math.log10(last), _INTERVALS, dtype=torch.float64)
        t = torch.cat([t.new_zeros(1), t[:-1], t.new_tensor([last])])
        t = torch.cat([t, t.new_tensor([bound])]) if bound > last else t
        f = 1 / (1 + torch.where(lengths[:, None] > 0, lengths[:, None] ** 2 * t, 0.0))
        mix = self._mixing().detach().double()
        mid, radius = mix @ (f[:, :-1] + f[:, 1:]) / 2, mix.abs() @ ((f[:, :-1] - f[:, 1:]) / 2 + slack)
        size = mid.abs() + radius
        top = size.square()
        top[self.n_values :] *= t[1:]
        if math.isinf(bound):  # sqrt(t) f_l falls beyond 1 / l^2; that of l = 0 does not
            far = (mix.abs() @ (last**0.5 * f[:, -2])).square()
            far[mix[:, 0].abs() * (lengths[0] == 0) > 0] = math.inf
            top[self.n_values :, -1] = far[self.n_values :]
        least = (mid.abs() - radius)[: self.n_values]
        return top, least.amax(0) if len(least) else least.sum(0)


def _worst(curvature: Tensor, top: Tensor) -> float:
    """sup_t sum_c curvature_c top_c(t)."""
    active = curvature > 0
    return float((curvature[active, None] * top[active]).sum(0).max()) if bool(active.any()) else 0.0


class _Both(nn.Module):
    """A potential's value and slope as a forward."""

    def __init__(self, of: Potential) -> None:
        super().__init__()
        self.of = of

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.of.value_and_slope(t)


class _Frozen(Function):
    """R of frozen weights: the dual is found with the value, by one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, energy: MeshRidge) -> Tensor:
        value, dual = energy._evaluated(x, True)
        ctx.energy = energy
        ctx.save_for_backward(x, dual)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, dual = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            dual = ctx.energy.gradient(x)
        return grads[0][:, None] * dual, None
