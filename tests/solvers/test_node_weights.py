"""Depth-varying weights: NumPy's and SciPy's interpolation, their space, and parameters as one flat point."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck

from solvers.errors import GliodeError
from solvers.node.fields import Standalone
from solvers.node.models import Node
from solvers.node.weights import DepthWeights, Parameters
from solvers.ode.integrate import integrate
from solvers.spaces import DepthSobolev, Euclidean

DURATION = 2.5
SHAPE = (2, 3)


def weights(kind: str, knots: int, dtype: torch.dtype = torch.float64) -> DepthWeights:
    made = DepthWeights(SHAPE, kind, knots, DURATION).to(dtype)
    nn.init.normal_(made.values)
    return made


def stages(
    steps: int = 7, nodes: tuple[float, ...] = (0, 0.5, 0.5, 1), dtype: torch.dtype = torch.float64
) -> Tensor:
    """The stage times of equal steps over the duration, (steps, s)."""
    t = torch.linspace(0, DURATION, steps + 1, dtype=dtype)
    return t[:-1, None] + t.diff()[:, None] * torch.tensor(nodes, dtype=dtype)


def at_stages(w: DepthWeights, times: Tensor) -> Tensor:
    """(steps, s, *shape)."""
    sampled = w.sample(times)
    return sampled.table[torch.tensor(sampled.index)]


def test_linear_weights_are_numpy_s_interpolation() -> None:
    for knots in (2, 3, 8, 21):
        w, times = weights("linear", knots), stages()
        ends = np.linspace(0, DURATION, knots)
        values = w.values.detach().numpy().reshape(knots, -1)
        expected = np.stack([np.interp(times.numpy(), ends, column) for column in values.T], -1)
        found = at_stages(w, times).detach().numpy()
        np.testing.assert_allclose(found, expected.reshape(*times.shape, *SHAPE), atol=1e-8)  # times to 1e-9


def test_cubic_weights_are_scipy_s_natural_spline() -> None:
    for knots in (3, 4, 9):
        w, times = weights("cubic", knots), stages()
        spline = CubicSpline(np.linspace(0, DURATION, knots), w.values.detach().numpy(), bc_type="natural")
        np.testing.assert_allclose(at_stages(w, times).detach().numpy(), spline(times.numpy()), atol=1e-7)


def test_a_knot_has_its_value_and_a_line_stays_a_line() -> None:
    slope, level = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    for kind in ("linear", "cubic"):
        w = weights(kind, 5)
        at_knots = at_stages(w, w.knots[:, None])
        torch.testing.assert_close(at_knots[:, 0], w.values, rtol=0, atol=1e-8)
        with torch.no_grad():
            w.values.copy_(level + w.knots[:, None, None] * slope)
        times = stages()
        torch.testing.assert_close(
            at_stages(w, times), level + times[..., None, None] * slope, rtol=0, atol=1e-7
        )


def test_steps_are_one_row_a_step_and_constants_one_row() -> None:
    times = stages(7)
    w = weights("steps", 7)
    assert torch.equal(at_stages(w, times), w.values[:, None].expand(7, 4, *SHAPE))
    torch.testing.assert_close(w.knots, (torch.arange(7, dtype=torch.float64) + 0.5) * DURATION / 7)
    one = weights("constant", 1)
    assert one.sample(times).table.shape == (1, *SHAPE)
    assert torch.equal(at_stages(one, times), one.values.expand(7, 4, *SHAPE))


def test_stages_at_the_same_time_share_a_row() -> None:
    """Kutta 4 on 7 steps has 15 different times; also where float32 rounds them."""
    for dtype in (torch.float64, torch.float32):
        for kind in ("linear", "cubic"):
            assert weights(kind, 8, dtype).sample(stages(dtype=dtype)).table.shape[0] == 15


def test_the_next_grid_is_not_served_from_the_last_one() -> None:
    w = weights("linear", 5)
    for times in (stages(7), stages(3), stages(7), stages(7, (0, 1 / 3, 2 / 3, 1))):
        fresh = DepthWeights(SHAPE, "linear", 5, DURATION).double()
        fresh.load_state_dict(w.state_dict())
        assert torch.equal(at_stages(w, times), at_stages(fresh, times))
    assert torch.equal(at_stages(copy.deepcopy(w), stages()), at_stages(w, stages()))


@pytest.mark.parametrize(("kind", "knots"), [("linear", 4), ("cubic", 5), ("steps", 3), ("constant", 1)])
def test_the_sample_s_derivative_by_the_values(kind: str, knots: int) -> None:
    w, times = weights(kind, knots), stages(3)

    def table(values: Tensor) -> Tensor:
        index = torch.tensor(w.sample(times).index)
        sampled: Tensor = torch.func.functional_call(_Table(w, times), {"w.values": values}, ())
        return sampled[index]

    assert gradcheck(table, (w.values.detach().requires_grad_(),), check_forward_ad=True)


class _Table(nn.Module):
    def __init__(self, w: DepthWeights, times: Tensor) -> None:
        super().__init__()
        self.w, self.times = w, times

    def forward(self) -> Tensor:
        return self.w.sample(self.times).table


def test_backwards_in_time_the_weights_are_met_in_reverse() -> None:
    """From T to 0 with W(t) is from 0 to T with -W(T - t), knots reversed; tanh is odd."""
    field = Standalone(3, knots=4, duration=DURATION).double()
    field.reset(rough=1.0)
    mirrored = Standalone(3, knots=4, duration=DURATION).double()
    with torch.no_grad():
        for name in field.names:
            mirrored.weights(name).values.copy_(-field.weights(name).values.flip(0))
    x = torch.randn(5, 3, dtype=torch.float64)
    times = torch.linspace(0, DURATION, 7, dtype=torch.float64)
    torch.testing.assert_close(
        integrate(field, x, times.flip(0)), integrate(mirrored, x, times), rtol=0, atol=1e-7
    )


def test_bad_weights_are_refused() -> None:
    for kind, knots, message in (
        ("quadratic", 3, "kind 'quadratic' is not one of linear, cubic, steps, constant"),
        ("linear", 1, "1 knots for kind 'linear'; give 2 or more"),
        ("cubic", 2, "2 knots for kind 'cubic'; give 3 or more"),
        ("steps", 0, "0 knots for kind 'steps'; give 1 or more"),
        ("constant", 2, "2 knots for kind 'constant'; give 1$"),
    ):
        with pytest.raises(GliodeError, match=message):
            DepthWeights(SHAPE, kind, knots)
    for duration in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(GliodeError, match="duration must be positive and finite"):
            DepthWeights(SHAPE, "linear", 2, duration)
    with pytest.raises(GliodeError, match=r"known on \[0, 2.5\], asked at 0 to 5; give the duration"):
        weights("linear", 3).sample(2 * stages())
    with pytest.raises(GliodeError, match="known on"):
        weights("cubic", 3).sample(stages() - 0.1)
    with pytest.raises(GliodeError, match="5 layers of weights for 7 steps"):
        weights("steps", 5).sample(stages(7))


def test_float32_weights_sample_to_float32_and_follow_the_module() -> None:
    w = weights("linear", 6)
    exact = at_stages(w, stages())
    assert w.float().sample(stages(dtype=torch.float32)).table.dtype == torch.float32
    rounded = at_stages(w, stages(dtype=torch.float32))
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)
    assert w.to(torch.float64).sample(stages()).table.dtype == torch.float64
    if torch.cuda.is_available():
        assert w.cuda().sample(stages().cuda()).table.is_cuda


def test_the_space_is_sobolev_over_the_depth_where_there_is_a_depth() -> None:
    """Against quadrature of the interpolant."""
    length, count = 0.7, 6
    w = weights("linear", count)
    space = w.space(length)
    assert isinstance(space, DepthSobolev) and space.shape == (count, *SHAPE)
    a, b = torch.randn(2, count, *SHAPE, dtype=torch.float64)
    t = np.linspace(0, DURATION, 5 * 4000 + 1)
    middle = (t[1:] + t[:-1]) / 2
    ends = np.linspace(0, DURATION, count)
    total = 0.0
    for u, v in zip(a.reshape(count, -1).T.numpy(), b.reshape(count, -1).T.numpy(), strict=True):
        fu, fv = np.interp(middle, ends, u), np.interp(middle, ends, v)
        du, dv = np.diff(np.interp(t, ends, u)), np.diff(np.interp(t, ends, v))
        h = t[1] - t[0]
        total += (fu * fv).sum() * h + length**2 * (du * dv).sum() / h
    assert math.isclose(space.inner(a, b), total, rel_tol=1e-6)
    for single in (weights("constant", 1), weights("steps", 1)):
        flat = single.space(length)
        assert isinstance(flat, Euclidean) and flat.shape == (6,)
    steps = weights("steps", 4).space(length)
    assert isinstance(steps, DepthSobolev) and steps.shape == (4, *SHAPE)


def test_roughness_is_the_mean_slope() -> None:
    w = weights("linear", 5)
    slopes = np.diff(w.values.detach().numpy(), axis=0) / (DURATION / 4)
    assert math.isclose(w.roughness(), np.abs(slopes).mean(), rel_tol=1e-12)
    assert weights("constant", 1).roughness() == 0
    with torch.no_grad():
        w.values.copy_(3 * w.knots[:, None, None].expand_as(w.values))
    assert math.isclose(w.roughness(), 3.0, rel_tol=1e-12)


# ---- all parameters of a model as one point ------------------------------------------------------------


def model() -> nn.Sequential:
    field = Standalone(3, knots=4, duration=DURATION)
    field.reset(rough=0.5)
    return nn.Sequential(nn.Linear(2, 3), Node(field, DURATION, 6), nn.Linear(3, 2)).double()


def test_parameters_round_trip() -> None:
    net = model()
    flat = Parameters(net, 0.3)
    m = flat.pack()
    size = sum(p.numel() for p in net.parameters())
    assert tuple(m.shape) == (size,) and flat.space.shape == (size,)
    parts = flat.unpack(m)
    for name, p in net.named_parameters():
        assert torch.equal(parts[name], p)
        assert torch.equal(flat.space.unpack(m)[name].reshape(p.shape), p)
    assert torch.equal(
        flat.space.pack({n: p.reshape(flat.space.spaces[n].shape) for n, p in parts.items()}), m
    )
    other = torch.randn_like(m)
    flat.load(other)
    assert torch.equal(flat.pack(), other) and all(p.requires_grad for p in net.parameters())
    assert not torch.equal(m, other), "a packed point is no view of the module"
    x = torch.randn(4, 2, dtype=torch.float64)
    loaded = net(x)
    called: Tensor = torch.func.functional_call(net, dict(flat.unpack(other)), (x,))
    assert torch.equal(loaded, called)


def test_a_flat_point_s_gradient_is_the_module_s() -> None:
    net = model()
    flat, x = Parameters(net), torch.randn(4, 2, dtype=torch.float64)
    m = flat.pack().requires_grad_()
    out: Tensor = torch.func.functional_call(net, dict(flat.unpack(m)), (x,))
    (found,) = torch.autograd.grad(out.square().sum(), m)
    net(x).square().sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    d = torch.randn_like(m)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(m.detach(), d)
        out = torch.func.functional_call(net, dict(flat.unpack(dual)), (x,)).square().sum()
        slope = float(forward_ad.unpack_dual(out).tangent)
    assert math.isclose(slope, float(found @ d), rel_tol=1e-11)


def test_the_product_space_is_sobolev_for_depth_and_euclidean_for_the_rest() -> None:
    net, length = model(), 0.3
    flat = Parameters(net, length)
    a, b = torch.randn(2, flat.pack().numel(), dtype=torch.float64)
    total = 0.0
    left, right = flat.unpack(a), flat.unpack(b)
    for name in left:
        if name.startswith("1.field"):
            knots = torch.linspace(0, DURATION, 4, dtype=torch.float64)
            total += DepthSobolev(knots, left[name].shape[1:], length).inner(left[name], right[name])
        else:
            total += float((left[name] * right[name]).sum())
    assert math.isclose(flat.space.inner(a, b), total, rel_tol=1e-12)
    g = flat.space.riesz(a)
    assert math.isclose(flat.space.inner(g, b), float(a @ b), rel_tol=1e-10)


def test_what_is_fixed_is_no_parameter() -> None:
    net: Any = model()
    net[2].requires_grad_(False)
    flat = Parameters(net)
    assert set(flat.own) == {"0.weight", "0.bias", "1.field.W.values", "1.field.b.values"}
    before = net[2].weight.clone()
    flat.load(torch.zeros(flat.space.shape, dtype=torch.float64))
    assert torch.equal(net[2].weight, before) and not net[0].weight.any()
    with pytest.raises(GliodeError, match="no parameter requires a gradient"):
        Parameters(net.requires_grad_(False))


def test_a_state_dict_comes_back_from_a_safetensors_file(tmp_path: Path) -> None:
    net: Any = model()
    again: Any = model()
    assert not torch.equal(again[0].weight, net[0].weight)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    again.load_state_dict(load_file(tmp_path / "net.safetensors"))
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(again(x), net(x))
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}, (
        "nothing but weights is stored"
    )
