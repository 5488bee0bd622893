r"""The smallest perturbation that changes a decision, from the sensitivities of the scores.

With the gaps g_j = f_j - f_label of the competing classes j and their gradients w_j at x + r:

    1. Newton's method to the nearest boundary (DeepFool: Moosavi-Dezfooli, Fawzi, Frossard 2016)
         r <- r - g_j / ||w_j||^2 w_j,          j that of the least |g_j| / ||w_j||,
       until the decision changes: a point on the boundary, but not the nearest one;
    2. along the boundary to where r is parallel to w_j, the condition of a nearest point, by asking the
       linearisation at r for the smallest perturbation of x itself (in reliability: Hasofer and Lind 1974,
       Rackwitz and Fiessler 1978; in attacks: Croce and Hein 2020)
         r <- r + t (q - r),    q = (w_j . r - g_j) / ||w_j||^2 w_j,
       with t halved where that crosses the boundary no sooner.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.sensitivity.attacks import Attack, decisions, evaluate, integers, lengths, wide
from inverse.sensitivity.directional import Map, checked, output
from solvers.errors import GliodeError

HALVINGS = 24  # of the interval that holds a crossing: 6e-8 of the norm, below float32's rounding


def minimal_attack(
    f: Map,
    x: Tensor,
    labels: Tensor | None = None,
    steps: int = 50,
    refine: int = 10,
    overshoot: float = 1e-3,
    competitors: int = 10,
) -> Attack:
    """The smallest L2 perturbation found that changes the decision of a classifier f.

    f: (B, ...) to scores (B, classes); labels: the right classes, where samples that are wrong already
    need no perturbation (None: those decided at x); steps: of part 1 at most; refine: steps of part 2;
    overshoot: how far beyond the boundary the sample is put, relative to the norm; competitors: how many
    of the classes of largest score are tried. Exact, but for the overshoot, for affine f; elsewhere an
    upper bound of the distance. Where no boundary was found the norm is inf.
    """
    x = checked(x, "x")
    if steps < 1 or refine < 0 or competitors < 1 or not 0 < overshoot < math.inf:
        raise GliodeError(
            f"minimal_attack: steps {steps}, refine {refine}, competitors {competitors}, "
            f"overshoot {overshoot:g}; give steps and competitors >= 1, refine >= 0, overshoot > 0"
        )
    scores = evaluate(f, x)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise GliodeError(f"f: scores have shape (B, classes), classes >= 2, not {tuple(scores.shape)}")
    own = scores.argmax(1) if labels is None else integers(labels, scores)
    rivals = min(competitors, scores.shape[1] - 1)
    best, beyond = torch.zeros_like(x), 1 + overshoot
    norms = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    norms[scores.argmax(1) == own] = math.inf

    rows = norms.isinf().nonzero().reshape(-1)
    r = torch.zeros_like(x)
    for _ in range(steps):
        if not len(rows):
            break
        r[rows] += _towards(f, x[rows], r[rows], beyond, own[rows], rivals)
        crossed = decisions(f, x[rows] + beyond * r[rows]) != own[rows]
        done = rows[crossed]
        if len(done):
            best[done], norms[done] = _crossing(f, x[done], beyond * r[done], own[done])
        rows = rows[~crossed]

    rows = (norms.isfinite() & (norms > 0)).nonzero().reshape(-1)
    share = torch.ones_like(norms)
    for _ in range(refine if len(rows) else 0):
        here = best[rows]
        change = _towards(f, x[rows], here, 1.0, own[rows], rivals, anchored=True)
        tried = here + wide(share[rows], x) * change
        # As long as the best so far: as far as a better one can reach.
        tried = tried * wide(norms[rows] / lengths(tried).clamp(min=torch.finfo(x.dtype).tiny), x)
        sooner = decisions(f, x[rows] + tried) != own[rows]
        share[rows] = torch.where(sooner, (2 * share[rows]).clamp(max=1), share[rows] / 2)
        done = rows[sooner]
        if len(done):
            best[done], norms[done] = _crossing(f, x[done], tried[sooner], own[done])

    # A sliver of the other class may end within the overshoot: there the crossing itself will do.
    outside = decisions(f, x + beyond * best) != own
    factor = torch.where(outside, beyond * torch.ones_like(norms), 1.0)
    perturbation = wide(factor, x) * best
    norms = torch.where(norms.isfinite(), lengths(perturbation), norms)
    return Attack(perturbation, norms, evaluate(f, x + perturbation))


def _towards(
    f: Map, x: Tensor, r: Tensor, beyond: float, own: Tensor, rivals: int, anchored: bool = False
) -> Tensor:
    """The change of r to the nearest linearised boundary; anchored: that makes the whole of r least.

    The linearisation is made at x + beyond r; classes whose gap has no gradient there are left out.
    """
    leaf = (x + beyond * r).requires_grad_()
    with torch.enable_grad():
        scores = output(f(leaf))
        order = scores.detach().scatter(1, own[:, None], -math.inf).topk(rivals, 1).indices
        gaps = scores.gather(1, order) - scores.gather(1, own[:, None])
    missing = "f: the scores do not depend on x through the tape; keep f in torch"
    if not gaps.requires_grad:
        raise GliodeError(missing)
    least = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    change = torch.zeros_like(r)
    for j in range(rivals):
        (w,) = torch.autograd.grad(gaps[:, j].sum(), leaf, retain_graph=True, allow_unused=True)
        if w is None:
            raise GliodeError(missing)
        gap, square = gaps[:, j].detach(), w.flatten(1).square().sum(1)
        if anchored:
            gap = gap - (w * r).flatten(1).sum(1)
        distance = gap.abs() / square.sqrt()
        nearer = distance < least  # false where w = 0, or anything is NaN
        least = torch.where(nearer, distance, least)
        this = -wide(gap / square, r) * w
        change = torch.where(wide(nearer, r), this - r if anchored else this, change)
    return change


def _crossing(f: Map, x: Tensor, r: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest t r, 0 < t <= 1, found to change the decision, and its norm; t = 1 does."""
    low = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    high = torch.ones_like(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        changed = decisions(f, x + wide(middle, x) * r) != own
        low, high = torch.where(changed, low, middle), torch.where(changed, middle, high)
    return wide(high, x) * r, high * lengths(r)
