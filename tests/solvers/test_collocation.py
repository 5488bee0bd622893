"""Networks with built-in values: derivatives against nested forward mode and differences, and the values."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

from solvers.errors import GliodeError
from solvers.node.collocation import Field, Flow, Map, Perceptron, scattered

LOW, HIGH = (0.0, -1.0), (2.0, 3.0)


def hat(z: Tensor) -> Tensor:
    """Initial values of two components."""
    return torch.cat([torch.sin(z[:, 1:]), z[:, 1:] ** 3], 1)


def edge(z: Tensor) -> Tensor:
    return (z[:, 1:] + 1) * (3 - z[:, 1:]) * (1 + z[:, :1])


FIELDS = {
    "plain": lambda: Field("tx", LOW, HIGH, 2, width=7, layers=2, seed=3),
    "start": lambda: Field("tx", LOW, HIGH, 2, lift=hat, start=True, width=7, layers=2, seed=3),
    "factor": lambda: Field("tx", LOW, HIGH, 2, lift=hat, factor=edge, width=7, layers=2, seed=3),
    "both": lambda: Field("tx", LOW, HIGH, 2, lift=hat, factor=edge, start=True, width=7, layers=2, seed=3),
}


def formula(field: Field) -> Map:
    """u(z) as in the docstring, written once more from the bare network."""

    def u(z: Tensor) -> Tensor:
        v = field.network(z)
        if field.start:
            v = v - field.network(z * torch.tensor([0.0, 1.0], dtype=z.dtype))
        v = v if field.factor is None else field.factor(z) * v
        return v if field.lift is None else v + field.lift(z)

    return u


def nested(f: Map, z: Tensor, ways: list[int]) -> Tensor:
    """The derivative of f by inputs `ways`, by nested forward mode."""
    if not ways:
        return f(z)
    along = torch.zeros_like(z)
    along[:, ways[0]] = 1.0
    found: Tensor = jvp(lambda y: nested(f, y, ways[1:]), (z,), (along,))[1]
    return found


@pytest.mark.parametrize("kind", FIELDS)
def test_derivatives_are_those_of_nested_forward_mode(kind: str) -> None:
    field, z = FIELDS[kind](), scattered(LOW, HIGH, 11, 1)
    names = ("t", "x", "tt", "xt", "xx")
    found = field.jets(z, names)
    torch.testing.assert_close(found[""], field(z))
    for name in names:
        expected = nested(formula(field), z, ["tx".index(letter) for letter in name])
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


def test_initial_and_boundary_values_are_built_in() -> None:
    z = scattered(LOW, HIGH, 20, 2)
    begin, left = z.clone(), z.clone()
    begin[:, 0], left[:, 1] = 0.0, -1.0
    assert torch.equal(FIELDS["start"]()(begin), hat(begin))
    torch.testing.assert_close(FIELDS["factor"]()(left), hat(left), rtol=0, atol=1e-14)
    both = FIELDS["both"]()
    assert torch.equal(both(begin), hat(begin))
    assert not torch.allclose(both(z), hat(z), atol=1e-2)


@pytest.mark.parametrize("kind", FIELDS)
def test_points_on_the_tape_give_the_same_derivatives(kind: str) -> None:
    """Both modes through the value and through jets, also after the same points without the tape."""
    field, z = FIELDS[kind](), scattered(LOW, HIGH, 6, 1)
    names = ("t", "x", "tx", "xx")
    expected = {name: part.detach() for name, part in field.jets(z, names).items()}
    leaf = z.detach().requires_grad_()  # the memory of z
    for name, d_t, d_x in (("", "t", "x"), ("x", "tx", "xx")):
        jets = field.jets(leaf, (name,) if name else ())
        for k, column in enumerate(jets[name].unbind(1)):
            (slope,) = torch.autograd.grad(column.sum(), leaf, retain_graph=True)
            wanted = torch.stack([expected[d_t][:, k], expected[d_x][:, k]], 1)
            torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-10)
    along = torch.zeros_like(z)
    along[:, 1] = 1.0
    torch.testing.assert_close(jvp(field, (z,), (along,))[1], expected["x"], rtol=1e-10, atol=1e-10)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(z, along.flip(1))
        found = field.jets(dual, ("x",))
        for name, wanted in (("", expected["t"]), ("x", expected["tx"])):
            torch.testing.assert_close(
                forward_ad.unpack_dual(found[name]).tangent, wanted, rtol=1e-10, atol=1e-10
            )


def test_a_tensor_of_points_that_changes_is_seen() -> None:
    field, z = FIELDS["both"](), scattered(LOW, HIGH, 5, 3)
    before = field(z)
    z += 0.1
    torch.testing.assert_close(field(z), field(z.clone()), rtol=0, atol=0)
    assert not torch.allclose(field(z), before)


def test_built_in_values_are_asked_once_for_the_same_points() -> None:
    asked = []

    def lift(z: Tensor) -> Tensor:
        asked.append(len(z))
        return hat(z)

    field, rows = Field("tx", LOW, HIGH, 2, lift=lift), torch.rand(6, 3, dtype=torch.float64)
    first, again = field(rows[:, :2]), field(rows[:, :2])
    assert asked == [6] and torch.equal(first, again)
    field.jets(rows[:, :2], ("x",))
    field(rows[:4, :2])
    field(rows[:, 1:])
    assert asked == [6, 6, 4, 6]


def test_flow_begins_at_its_state_and_knows_its_rate() -> None:
    flow = Flow(5.0, (-1, -2), (1, 2), width=6, layers=2, seed=1)
    x, t = scattered((-1, -2), (1, 2), 9, 4), torch.linspace(0, 5, 9, dtype=torch.float64)[:, None]
    assert torch.equal(flow(torch.zeros_like(t), x), x)
    value, rate = flow.rate(t, x)
    torch.testing.assert_close(value, flow(t, x))
    h = 1e-5
    torch.testing.assert_close(rate, (flow(t + h, x) - flow(t - h, x)) / (2 * h), rtol=1e-8, atol=1e-8)
    assert float(rate.norm()) > 0.1


def test_derivatives_have_gradients_in_both_modes() -> None:
    """By the weights, of u_xx: reverse and forward mode against a difference."""
    field, z = FIELDS["start"](), scattered(LOW, HIGH, 6, 5)
    weights = {name: p.detach() for name, p in field.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    ways = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in weights.items()}

    class Bent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, z: Tensor) -> Tensor:
            return self.field.jets(z, ("xx",))["xx"].square().sum()

    def at(step: float) -> Tensor:
        return functional_call(Bent(), {f"field.{k}": weights[k] + step * ways[k] for k in weights}, (z,))

    difference = float(at(1e-5) - at(-1e-5)) / 2e-5
    leaves = [p.requires_grad_() for p in field.parameters()]
    grads = torch.autograd.grad(Bent()(z), leaves, materialize_grads=True)
    assert sum(float((g * d).sum()) for g, d in zip(grads, ways.values(), strict=True)) == pytest.approx(
        difference, rel=1e-7
    )
    with torch.no_grad(), forward_ad.dual_level():
        dual = {f"field.{k}": forward_ad.make_dual(weights[k], ways[k]) for k in weights}
        tangent = forward_ad.unpack_dual(functional_call(Bent(), dual, (z,))).tangent
    assert float(tangent) == pytest.approx(difference, rel=1e-7)


def test_seeds_fix_weights_and_points() -> None:
    a, b, c = (Perceptron((0,), (1,), seed=seed) for seed in (1, 1, 2))
    z = scattered((0,), (1,), 4, 0)
    assert torch.equal(a(z), b(z)) and not torch.equal(a(z), c(z))
    torch.testing.assert_close(Perceptron((0,), (1,), seed=1, gain=0.1)(z), 0.1 * a(z))
    points = scattered(LOW, HIGH, 256, 7)
    assert torch.equal(points, scattered(LOW, HIGH, 256, 7))
    assert not torch.equal(points, scattered(LOW, HIGH, 256, 8))
    # Even: the mean of a smooth function is far nearer than 256 random points come (about 0.04).
    mean = float(torch.cos(points).mean(0)[0])
    assert mean == pytest.approx(math.sin(2.0) / 2, abs=2e-3)


def test_bad_input_is_named() -> None:
    with pytest.raises(GliodeError, match="box"):
        Perceptron((0.0,), (0.0,))
    with pytest.raises(GliodeError, match="layers"):
        Perceptron((0.0,), (1.0,), layers=0)
    with pytest.raises(GliodeError, match="letter"):
        Field("txy", LOW, HIGH)
    with pytest.raises(GliodeError, match="coordinate t"):
        Field("xy", LOW, HIGH, start=True)
    field = Field("tx", LOW, HIGH, lift=lambda z: z[:, 0])
    with pytest.raises(GliodeError, match="built-in value"):
        field(scattered(LOW, HIGH, 3))
    with pytest.raises(GliodeError, match="no derivative 'y'"):
        field.jets(scattered(LOW, HIGH, 3), ("y",))
    with pytest.raises(GliodeError, match="order 2"):
        field.jets(scattered(LOW, HIGH, 3), ("xxx",))
