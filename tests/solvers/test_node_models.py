"""Networks of solvers.node: against layers written by hand, quadratic programming, finite differences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.autograd import gradcheck

from solvers.errors import GliodeError
from solvers.node.fields import GradientFlow, ODENet, Standalone, TwoLayer
from solvers.node.models import Augment, Components, Net, Node, fixed, simplex
from solvers.ode.fields import VectorField
from solvers.ode.integrate import Noise
from solvers.ode.tableaux import TABLEAUX, tableau

ROOT = Path(__file__).parents[2]
DIM, LAYERS = 3, 5
EXPLICIT = [name for name, scheme in TABLEAUX.items() if scheme.explicit and not scheme.partitioned]


@pytest.fixture(autouse=True)
def float64() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def residual(scheme: str = "euler", **more: object) -> Node:
    """A residual network with random layers."""
    field = Standalone(DIM, kind="steps", knots=LAYERS)
    nn.init.normal_(field.weights("W").values)
    nn.init.normal_(field.weights("b").values)
    return Node(field, 2.0, LAYERS, scheme, **more)  # type: ignore[arg-type]


def scalar(out: Tensor) -> Tensor:
    """Not symmetric in samples and components."""
    return (torch.cos(torch.arange(out.numel()).double()).view(out.shape) * out).sum() + out.square().mean()


def differences(value: Callable[[], Tensor], p: Tensor, e: float = 1e-5) -> Tensor:
    """d value / d p by central differences."""
    found = torch.zeros_like(p)
    with torch.no_grad():
        for k in range(p.numel()):
            here = float(p.view(-1)[k])
            sides = []
            for moved in (here + e, here - e):
                p.view(-1)[k] = moved
                sides.append(float(value()))
            p.view(-1)[k] = here
            found.view(-1)[k] = (sides[0] - sides[1]) / (2 * e)
    return found


# ---- learned time steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0.3, 1.0, 7.0])
def test_the_projection_on_the_simplex_is_the_quadratic_programme_s(total: float) -> None:
    for size in (1, 2, 6):
        v = torch.randn(size)
        found = simplex(v, total)
        solved = minimize(
            lambda h, v=v.numpy(): 0.5 * ((h - v) ** 2).sum(),
            np.full(size, total / size),
            jac=lambda h, v=v.numpy(): h - v,
            bounds=[(0, None)] * size,
            constraints={"type": "eq", "fun": lambda h: h.sum() - total, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 200},
        )
        np.testing.assert_allclose(found.numpy(), solved.x, atol=1e-6)
        assert float(found.min()) >= 0 and abs(float(found.sum()) - total) < 1e-13 * max(total, 1)


def test_the_projection_leaves_the_simplex_alone_and_meets_its_corners() -> None:
    inside = torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(simplex(inside, 1.0), inside, rtol=0, atol=1e-15)
    torch.testing.assert_close(simplex(inside + 4.0, 1.0), inside, rtol=0, atol=1e-14)
    assert torch.equal(simplex(torch.tensor([9.0, 1.0, -3.0]), 1.0), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(simplex(torch.tensor([2.0, 2.0, -1.0]), 1.0), torch.tensor([0.5, 0.5, 0.0]))


def test_the_projection_s_derivative() -> None:
    for seed in range(5):
        v = torch.randn(6, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        found = simplex(v, 1.0).detach()
        if seed == 0:
            assert 0 < int((found == 0).sum()) < 5, "some steps should be zero here"
        assert gradcheck(lambda v: simplex(v, 1.0), (v,), check_forward_ad=True)


@pytest.mark.parametrize("gradient", ["adjoint", "autograd", "checkpointed"])
def test_learned_steps_have_the_derivative_of_differences(gradient: str) -> None:
    node = residual("heun", learned="simplex", gradient=gradient)
    assert node.free_steps is not None
    with torch.no_grad():
        node.free_steps.copy_(torch.tensor([0.9, -0.4, 0.5, 0.2, 0.3]))
    times = node.times()
    assert times.shape == (LAYERS + 1,) and abs(float(times[-1].detach()) - 2.0) < 1e-14
    assert float(times.diff().min()) == 0, "one step is switched off"
    x = torch.randn(4, DIM)
    scalar(node(x)).backward()
    for p in node.parameters():
        assert p.grad is not None
        expected = differences(lambda: scalar(node(x)), p.data)
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-8)
    before = float(scalar(node(x)).detach())
    torch.optim.SGD([node.free_steps], lr=1e-3).step()
    assert float(scalar(node(x)).detach()) < before


def test_fresh_learned_steps_are_equal() -> None:
    node = residual(learned="simplex")
    torch.testing.assert_close(node.times(), torch.linspace(0, 2.0, LAYERS + 1), rtol=0, atol=1e-14)
    assert "free_steps" in dict(node.named_parameters())
    assert residual().free_steps is None


# ---- models -----------------------------------------------------------------------------------------------


def test_a_resnet_is_its_residual_layers() -> None:
    node, x = residual(), torch.randn(7, DIM)
    y, states = x, [x]
    for K, b in zip(node.field.get_parameter("W.values"), node.field.get_parameter("b.values"), strict=True):
        y = y + 2.0 / LAYERS * torch.tanh(y @ K.T + b)
        states.append(y)
    torch.testing.assert_close(node(x), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(node(x, trajectory=True), torch.stack(states), rtol=1e-13, atol=1e-13)
    expected = torch.autograd.grad(scalar(y), list(node.parameters()))
    found = torch.autograd.grad(scalar(node(x)), list(node.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_odenet_is_its_layers() -> None:
    field = ODENet(DIM, "softplus", kind="steps", knots=LAYERS)
    for p in field.parameters():
        nn.init.normal_(p)
    node, y = Node(field, 2.0, LAYERS, "euler"), torch.randn(7, DIM)
    found = node(y)
    parts = (field.weights(name).values for name in ("K", "b", "alpha"))
    for K, b, alpha in zip(*parts, strict=True):
        y = y + 2.0 / LAYERS * alpha * torch.logaddexp(y @ K.T + b, torch.zeros(()))
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)


def combined(y: Tensor, factors: np.ndarray, K: list[Tensor]) -> Tensor:
    """y + sum_j factor_j K_j."""
    for factor, k in zip(factors, K, strict=True):
        y = y + float(factor) * k
    return y


@pytest.mark.parametrize("scheme", EXPLICIT)
@pytest.mark.parametrize("make", [Standalone, ODENet, GradientFlow], ids=lambda make: make.__name__)
def test_a_runge_kutta_net_is_its_tableau_with_the_layer_s_weights(
    scheme: str, make: Callable[..., VectorField]
) -> None:
    field = make(DIM, kind="steps", knots=LAYERS)
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    node, x = Node(field, 2.0, LAYERS, scheme), torch.randn(4, DIM)
    coefficients, h, y = tableau(scheme), 2.0 / LAYERS, x
    for layer in zip(*(p.unbind(0) for p in field.parameters()), strict=True):
        K: list[Tensor] = []
        for row in coefficients.A:
            K.append(field.rhs(combined(y, h * row[: len(K)], K), *layer))
        y = combined(y, h * coefficients.b, K)
    torch.testing.assert_close(node(x), y, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(scalar(y), list(node.parameters()))
    found = torch.autograd.grad(scalar(node(x)), list(node.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_the_plain_net_is_its_layers() -> None:
    net, x = Net(DIM, LAYERS, "relu"), torch.randn(4, DIM)
    for p in net.parameters():
        nn.init.normal_(p)
    y, states = x, [x]
    for K, b in zip(net.K.values, net.b.values, strict=True):
        y = (y @ K.T + b).clamp(min=0)
        states.append(y)
    torch.testing.assert_close(net(x), y)
    torch.testing.assert_close(net(x, trajectory=True), torch.stack(states))


def test_a_finer_grid_comes_nearer_to_the_flow_of_the_same_weights() -> None:
    """Order 4 in the number of steps: the weights are functions of the depth, not of the layer."""
    field = Standalone(DIM, kind="linear", knots=3)
    field.reset(rough=1.0)
    x = torch.randn(6, DIM)
    with torch.no_grad():
        exact = Node(field, 1.0, 256)(x)
        coarse, fine = (float((Node(field, 1.0, steps)(x) - exact).norm()) for steps in (16, 32))
    assert abs(np.log2(coarse / fine) - 4) < 0.3


def test_lifting_and_reading_off() -> None:
    x = torch.randn(2, 4, DIM)
    lifted = Augment(2)(x)
    assert lifted.shape == (2, 4, DIM + 2)
    assert torch.equal(lifted[..., :DIM], x) and not lifted[..., DIM:].any()
    assert torch.equal(Components(2)(x), x[..., :2])
    layer = fixed(nn.Linear(DIM, 2))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("shape", [(DIM,), (5, DIM), (2, 5, DIM)])
def test_a_batch_of_any_shape_is_its_samples_one_by_one(shape: tuple[int, ...]) -> None:
    node, x = residual("kutta4"), torch.randn(shape)
    one_by_one = torch.stack([node(sample) for sample in x.reshape(-1, DIM)]).reshape(shape)
    torch.testing.assert_close(node(x), one_by_one, rtol=1e-13, atol=1e-13)
    assert node(x, trajectory=True).shape == (LAYERS + 1, *shape)


# ---- inside an ordinary network ---------------------------------------------------------------------------


class Flow(nn.Module):
    """A convolution, a flow of what comes out, a linear head."""

    def __init__(self, gradient: str = "adjoint", store: str = "stages") -> None:
        super().__init__()
        field = TwoLayer(8, 6)
        field.reset()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()
        )
        self.flow = Node(field, steps=3, gradient=gradient, store=store)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.flow(self.stem(images)))
        return out


def test_inside_a_convolutional_network_every_gradient_is_that_of_differences() -> None:
    net, images, classes = Flow(), torch.randn(6, 1, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    net.train()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(images), classes)

    loss().backward()
    for name, p in net.named_parameters():
        expected = differences(loss, p.data)
        assert p.grad is not None and float(expected.abs().max()) > 1e-6, name
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-8, msg=name)
    before = float(loss().detach())
    torch.optim.SGD(net.parameters(), lr=0.05).step()
    assert float(loss().detach()) < before


def test_all_ways_to_the_gradient_train_the_network_alike() -> None:
    images, classes = torch.randn(6, 1, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    results = []
    start = Flow().state_dict()
    for gradient, store in (
        ("autograd", "stages"),
        ("adjoint", "stages"),
        ("adjoint", "states"),
        ("checkpointed", "stages"),
    ):
        net = Flow(gradient, store)
        net.load_state_dict(start)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), classes).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-7, atol=1e-8)


def test_two_blocks_may_share_a_field() -> None:
    field = TwoLayer(DIM, 4)
    field.reset()
    block, x = Node(field, steps=3), torch.randn(4, DIM)
    twice = nn.Sequential(block, nn.Linear(DIM, DIM), block)
    scalar(twice(x)).backward()
    found = field.weights("W1").values
    assert found.grad is not None
    expected = differences(lambda: scalar(twice(x)), found.data)
    torch.testing.assert_close(found.grad, expected, rtol=1e-6, atol=1e-8)


# ---- noise, modes, types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["state", "rhs"])
def test_noise_is_for_training_only(where: str) -> None:
    node = residual(noise=Noise(0.1, where))
    quiet = residual()
    quiet.load_state_dict(node.state_dict())
    x = torch.randn(50, DIM)
    node.train()
    assert float((node(x) - node(x)).abs().min()) > 0
    node.eval()
    assert torch.equal(node(x), quiet(x))


def test_noise_in_the_state_has_its_size_and_follows_its_seed() -> None:
    """With W = 0 and b = 0 a residual network only adds the noise up: a random walk."""
    field = Standalone(2, kind="steps", knots=LAYERS)
    node = Node(field, 2.0, LAYERS, "euler", noise=Noise(0.1, "state", torch.Generator().manual_seed(3)))
    x = torch.zeros(20000, 2)
    with torch.no_grad():
        for p in field.parameters():
            p.zero_()
        spread = float(node(x).std())
    assert abs(spread - 0.1 * LAYERS**0.5) < 0.02 * spread
    ends = []
    for _ in range(2):
        node.noise = Noise(0.1, "rhs", torch.Generator().manual_seed(3))
        ends.append(node(x[:5]))
    assert torch.equal(*ends) and bool(ends[0].any())


def test_the_module_moves_between_types() -> None:
    torch.set_default_dtype(torch.float32)
    node = residual("kutta4", learned="simplex")
    x = torch.randn(4, DIM)
    single = node(x)
    assert single.dtype == torch.float32
    double = node.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-5)
    assert node.float()(x).dtype == torch.float32
    field = TwoLayer(DIM, 4)
    field.reset()
    mixed = Node(field, steps=3)
    mixed(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixed.parameters())


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes() -> None:
    for node in (
        residual("kutta4"),
        residual("heun", learned="simplex"),
        Node(Standalone(DIM, knots=4), steps=6),
    ):
        x = torch.randn(16, DIM)
        results = []
        for device in ("cpu", "cuda"):
            node.to(device).zero_grad()
            y = node(x.to(device))
            scalar(y.cpu()).backward()
            results.append(
                [y.detach().cpu(), *(p.grad.cpu() for p in node.parameters() if p.grad is not None)]
            )
        torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


def test_a_node_and_weights_that_do_not_fit_are_refused() -> None:
    field = Standalone(DIM, kind="steps", knots=LAYERS)
    for message, make in (
        ("0 steps of a duration 1", lambda: Node(TwoLayer(DIM, 2), steps=0)),
        ("20 steps of a duration -1", lambda: Node(TwoLayer(DIM, 2), -1)),
        ("learned is 'softmax'", lambda: Node(TwoLayer(DIM, 2), learned="softmax")),
        ("node: 6 steps, but weights for 5", lambda: Node(field, steps=6)),
        ("learned time steps need weights of kind", lambda: Node(Standalone(DIM), learned="simplex")),
        (r"the duration is 3.0, its weights know \[0, 1.0\]", lambda: Node(Standalone(DIM), 3.0)),
        ("scheme 'rk45' is not one of", lambda: Node(TwoLayer(DIM, 2), scheme="rk45")),
        (
            "gradient 'backprop' is not one of",
            lambda: Node(TwoLayer(DIM, 2), gradient="backprop")(torch.ones(DIM)),
        ),
        ("store 'all' is not", lambda: Node(TwoLayer(DIM, 2), store="all")(torch.ones(DIM))),
    ):
        with pytest.raises(GliodeError, match=message):
            make()


def test_a_network_trains_where_dolfinx_is_absent() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['dolfinx', 'petsc4py', 'mpi4py', 'slepc4py', 'ufl'])\n"
        "import torch\n"
        "from solvers.node.fields import TwoLayer\n"
        "from solvers.node.models import Node\n"
        "field = TwoLayer(2, 3); field.reset()\n"
        "Node(field)(torch.ones(4, 2)).sum().backward()\n"
        "print(all(p.grad is not None for p in field.parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr
