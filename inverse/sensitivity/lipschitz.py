r"""Lipschitz constants in the L2 norm, from below and from above.

    local_lipschitz       ||F'(x)|| at points: a lower bound of the constant of F wherever it is used
    certified_lipschitz   prod_l ||W_l|| slope_l: an upper bound for all inputs
    certified_flow        the same for one step after another of a ResNet or a neural ODE
    certified_radius      what no attack can reach

The upper bound holds for every input, and is often far above the true constant, the more so the deeper
the network: the leading directions of successive layers seldom meet. A large bound therefore says
nothing; a small one is a guarantee, in exact arithmetic (the spectral norms are rounded up; the network's
own rounding errors, of relative size 1e-7 in float32, are not covered).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inverse.sensitivity.directional import Linearisation, Map
from solvers.errors import GliodeError
from solvers.node.fields import GradientFlow, ODENet, Standalone, TwoLayer
from solvers.node.models import Augment, Components, Net, Node
from solvers.node.nonexpansive import spectral_bound
from solvers.ode.fields import VectorField
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import tableau

# Of layers without weights: the largest |slope|, or 1 of a projection.
_KNOWN: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.Softplus: 1.0,
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    Augment: 1.0,
    Components: 1.0,
}


def local_lipschitz(F: Map, x: Tensor, iterations: int = 20, seed: int = 0) -> Tensor:
    """||F'(x_b)|| of each sample, (B,), from below: by Lanczos bidiagonalisation (Golub and Kahan 1965).

    F: a batch (B, ...) to a batch, each sample by itself; all samples share each product. The value
    returned is ||F'(x_b) v|| / ||v|| for the best v found, so it is a lower bound after any number of
    `iterations` (each one tangent and one adjoint product) and exact after min(inputs, outputs) of them.
    Its maximum over data is a lower bound of F's constant, where F is differentiable.
    """
    line = Linearisation(F, x)
    if x.ndim < 2 or line.value.ndim < 1 or len(line.value) != len(x):
        raise GliodeError(
            f"local_lipschitz: F maps {tuple(x.shape)} to {tuple(line.value.shape)}; give a map of batches "
            "(B, ...), or take singular_values"
        )
    if iterations < 1:
        raise GliodeError(f"iterations: {iterations}; give 1 or more")

    def tangent(v: Tensor) -> Tensor:
        return line.tangent(v.reshape(x.shape)).reshape(len(x), -1)

    def adjoint(u: Tensor) -> Tensor:
        return line.adjoint(u.reshape(line.value.shape)).reshape(len(x), -1)

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(line.value.shape, generator=generator, dtype=torch.float64).to(line.value)
    v, _ = _normalised(adjoint(start), 0.0)  # without a part in the null space
    u, a = _normalised(tangent(v), 0.0)
    V, U, scale = v[:, None], u[:, None], a
    steps = min(iterations, x[0].numel(), line.value[0].numel())
    B = torch.zeros(len(x), steps, steps, dtype=v.dtype, device=v.device)
    B[:, 0, 0] = a
    for k in range(1, steps):  # F' V = U B, B upper bidiagonal
        v, b = _normalised(_without(adjoint(u), V), scale)
        V = torch.cat([V, v[:, None]], 1)
        u, a = _normalised(_without(tangent(v), U), scale)
        U = torch.cat([U, u[:, None]], 1)
        B[:, k - 1, k], B[:, k, k] = b, a
        scale = torch.maximum(scale, torch.maximum(a, b))
    leading = torch.linalg.svd(B)[2][:, 0]
    best = torch.einsum("bk,bkn->bn", leading, V)
    return tangent(best).norm(dim=1) / best.norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)


def _without(a: Tensor, basis: Tensor) -> Tensor:
    """a (B, n) without its part in the rows of basis (B, k, n), twice."""
    for _ in range(2):
        a = a - torch.einsum("bk,bkn->bn", torch.einsum("bkn,bn->bk", basis, a), basis)
    return a


def _normalised(a: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """a / ||a|| and ||a||, both 0 where that is rounding relative to scale: the sample is done."""
    norm = a.norm(dim=1)
    kept = norm > 100 * torch.finfo(a.dtype).eps * scale
    return torch.where(kept[:, None], a / norm[:, None], 0.0), torch.where(kept, norm, 0.0)


def certified_lipschitz(net: nn.Module, bounds: Mapping[nn.Module, float] | None = None) -> float:
    """An upper bound of the L2 Lipschitz constant of a layer or an nn.Sequential of layers, for all inputs.

    Linear layers by their spectral norms (SVD), activations by their largest slope (ReLU, Tanh, Sigmoid,
    Softplus, LeakyReLU, ELU), Flatten, Identity, and those of solvers.node.models: Node, Net, Augment,
    Components. bounds: of other modules in it, {module: number}. Raises GliodeError for a module that it does
    not know.
    """
    if bounds is not None and net in bounds:
        if not bounds[net] >= 0:
            raise GliodeError(f"bounds: {bounds[net]} for {type(net).__name__}; give a number >= 0")
        return float(bounds[net])
    if isinstance(net, nn.Sequential):
        return math.prod(certified_lipschitz(layer, bounds) for layer in net)
    if isinstance(net, nn.Linear):
        return float(_spectral(net.weight))
    if isinstance(net, Node):
        return certified_flow(net.field, net.times(), net.scheme)
    if isinstance(net, Net):
        slope = max(map(abs, net.sigma.slopes))
        return math.prod((slope * _spectral(net.K.values)).tolist())
    if isinstance(net, nn.LeakyReLU):
        return max(1.0, abs(net.negative_slope))
    if isinstance(net, nn.ELU):
        return max(1.0, abs(net.alpha))
    if type(net) not in _KNOWN:
        raise GliodeError(
            f"certified_lipschitz: no bound is known for {type(net).__name__}; give it: bounds={{it: number}}"
        )
    return _KNOWN[type(net)]


def certified_flow(
    field: VectorField | Tensor | float, times: Tensor, scheme: str | Tableau = "euler"
) -> float:
    r"""An upper bound of the Lipschitz constant of x(t_0) -> x(t_N) by an explicit scheme, for all inputs.

    With L_i a bound of the field's constant at stage i of a step h the stages and the step obey

        l_i <= 1 + |h| sum_j |a_ij| L_j l_j,    factor <= 1 + |h| sum_i |b_i| L_i l_i,

    for explicit Euler prod(1 + h L_n), and the bound is the product of the factors. The factor of a
    GradientFlow with slopes >= 0 is 1 where h L / 2 is within the scheme's circle-contractivity radius:
    that step is non-expansive.

    field: a field of solvers.node.fields, or its constant L: a number, or a tensor (steps,) or (steps,
    stages) where it depends on the depth, such as [certified_lipschitz(f_n)] of a ResNet x + h f_n(x);
    times: the grid, as in `solvers.ode.integrate`.
    """
    scheme = tableau(scheme)
    if not scheme.explicit or scheme.partitioned:
        raise GliodeError(
            f"certified_flow: {scheme.name} is implicit or partitioned; take an explicit scheme"
        )
    if times.ndim != 1 or len(times) < 2:
        raise GliodeError(f"times: give two or more in one dimension, not {tuple(times.shape)}")
    times = times.detach().cpu().double()
    steps = times.diff()
    shape = (len(steps), scheme.stages)
    monotone = False
    if isinstance(field, VectorField):
        bounds = _field_bounds(field, times[:-1, None] + steps[:, None] * torch.from_numpy(scheme.c.copy()))
        monotone = isinstance(field, GradientFlow) and field.sigma.slopes[0] >= 0
    else:
        given = torch.as_tensor(field, dtype=torch.float64).detach().cpu()
        if given.ndim > 2 or (given.ndim and given.shape not in (shape[:1], shape)):
            raise GliodeError(
                f"field: bounds of shape {tuple(given.shape)} for {shape[0]} steps of {shape[1]} stages"
            )
        if not bool((given >= 0).all()):
            raise GliodeError("field: a Lipschitz constant is not negative")
        bounds = (given[:, None] if given.ndim == 1 else given).expand(shape)
    A, b = abs(scheme.A), abs(scheme.b)
    log = 0.0
    for h, L in zip(steps.tolist(), bounds.tolist(), strict=True):
        if monotone and 0 <= h * max(L) / 2 <= scheme.contractivity_radius:
            continue
        growth: list[float] = []
        for i in range(scheme.stages):
            growth.append(1 + abs(h) * sum(A[i, j] * L[j] * growth[j] for j in range(i)))
        log += math.log1p(abs(h) * sum(b[i] * L[i] * growth[i] for i in range(scheme.stages)))
    return math.exp(log) if log < 700 else math.inf


def _field_bounds(field: VectorField, stages: Tensor) -> Tensor:
    """A bound of the field's Lipschitz constant at the stage times (steps, s)."""
    if not isinstance(field, Standalone | ODENet | GradientFlow | TwoLayer):
        raise GliodeError(
            f"certified_flow: no bound is known for {type(field).__name__}; give its Lipschitz constant"
        )
    with torch.no_grad():
        sampled = dict(zip(field.names, field.sample(stages), strict=True))
    size = {
        name: _spectral(s.table) if s.table.ndim == 3 else s.table.double().cpu().abs()
        for name, s in sampled.items()
        if s.table.ndim != 2  # biases do not matter
    }
    at = {name: values[torch.tensor(sampled[name].index)] for name, values in size.items()}
    bound = torch.full(stages.shape, max(abs(slope) for slope in field.sigma.slopes), dtype=torch.float64)
    for values in at.values():
        bound = bound * (values.square() if isinstance(field, GradientFlow) else values)
    return bound


def _spectral(W: Tensor) -> Tensor:
    """`spectral_bound` of a matrix or a stack of them, off the tape and in float64."""
    return spectral_bound(W.detach().cpu().double())


def certified_radius(scores: Tensor, lipschitz: float) -> Tensor:
    r"""The L2 radius (B,) in which the decision holds, for scores (B, classes) with that constant:

        (largest score - second largest) / (sqrt 2 lipschitz)

    (Tsuzuku, Sato, Sugiyama 2018): the difference of two scores has the constant sqrt 2 lipschitz.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise GliodeError(f"scores: shape {tuple(scores.shape)}; give (B, classes), classes >= 2")
    if not lipschitz > 0:
        raise GliodeError(f"lipschitz: {lipschitz}; give a positive bound")
    top = scores.detach().topk(2, 1).values
    return (top[:, 0] - top[:, 1]) / (math.sqrt(2) * lipschitz)
