"""Deep energies against differences, dense Hessians and what they say of themselves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inverse.losses import Loss, Mean, SquaredError
from inverse.methods import Adam
from inverse.regularizers.learned.adversarial import AdversarialNetwork
from inverse.regularizers.learned.deep import RAMP, SOFT, STUDENT, TANH, Bend, Layer, Reach
from inverse.regularizers.learned.energy import Energy, Learned
from inverse.regularizers.learned.files import Card, load_energy, save
from inverse.regularizers.learned.icnn import ICNN
from inverse.regularizers.learned.nett import NETT
from inverse.regularizers.learned.tdv import TDV
from inverse.trainers.adversarial import Adversarial, artefacts, pairs
from inverse.trainers.denoising import Denoising
from inverse.training import train
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

Make = Callable[..., Energy]
SMALL: dict[str, Make] = {
    "icnn": lambda **o: ICNN(**{"channels": 3, "layers": 2, **o}),
    "adversarial": lambda **o: AdversarialNetwork(**{"channels": 2, "layers": 3, **o}),
    "nett": lambda **o: NETT(**{"channels": 3, "scales": 2, **o}),
    "tdv": lambda **o: TDV(**{"channels": 2, "scales": 2, **o}),
}
every = pytest.mark.parametrize("name", SMALL)


def make(name: str, seed: int = 0, **options: float) -> Energy:
    """With biases that are not zero either."""
    torch.manual_seed(seed)
    energy = SMALL[name](**options).double()
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return energy


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every
@pytest.mark.parametrize("shape", [(9, 12), (7, 8, 7)])
def test_gradients_and_hessians_are_those_of_differences(name: str, shape: tuple[int, ...]) -> None:
    R = Learned(make(name, dim=len(shape)), Euclidean(images(*shape).numel()), shape, 2.0, 0.5)
    m, d, h = images(*shape).reshape(-1), images(*shape, seed=2).reshape(-1), 1e-5
    slope = float(R(m + h * d) - R(m - h * d)) / (2 * h)
    assert float(R.gradient(m) @ d) == pytest.approx(slope, rel=1e-6)
    turn = (R.gradient(m + h * d) - R.gradient(m - h * d)) / (2 * h)
    torch.testing.assert_close(R.hessian_action(m, d), turn, rtol=1e-5, atol=1e-6 * float(turn.abs().max()))


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_no_hessian_leaves_the_guarantee(name: str, seed: int) -> None:
    energy = make(name, seed, squares=0.1)
    g = energy.guarantee()
    assert g.coercive and g.lipschitz < float("inf")
    for x in (images(9, 8), 0.05 * images(9, 8), 5 * images(9, 8)):
        dense = torch.autograd.functional.hessian(lambda m: energy(m.reshape(1, 9, 8))[0], x.reshape(-1))
        assert isinstance(dense, Tensor)
        values = torch.linalg.eigvalsh(dense)
        assert -g.modulus - 1e-9 <= float(values[0]) and float(values[-1]) <= g.lipschitz


@every
def test_it_grows_in_every_direction_where_it_says_so(name: str) -> None:
    energy = make(name, squares=0.1)
    x = images(20, 10, 11)
    with torch.no_grad():
        far = [energy(t * x) for t in (1e3, 1e4)]
    half = 0.05 * x.square().flatten(1).sum(1)
    assert bool((far[1] > 0.5e8 * half).all()) and bool((far[1] > far[0]).all())
    assert not make(name, squares=0.0).guarantee().coercive


@every
def test_any_size_will_do_and_a_shift_by_whole_steps_is_not_seen(name: str) -> None:
    """Something small on a flat ground; beside it the energy of the flat ground itself."""
    energy = make(name, squares=0.0)
    spot = images(5, 5)

    def seen(size: int, at: int) -> float:
        x = torch.zeros(1, size, size, dtype=torch.float64)
        flat = float(energy(x))
        x[0, at : at + 5, at : at + 5] = spot
        return float(energy(x)) - flat

    with torch.no_grad():
        here = seen(72, 32)
        assert abs(here) > 1e-3
        for size, at in ((72, 36), (79, 32), (85, 40)):
            assert seen(size, at) == pytest.approx(here, rel=1e-9)


@every
def test_a_brighter_picture_is_not_seen(name: str) -> None:
    energy = make(name, squares=0.0)
    x = images(2, 12, 13)
    torch.testing.assert_close(energy(x + 3.0), energy(x))


@every
def test_pictures_of_a_batch_do_not_meet(name: str) -> None:
    energy, x = make(name), images(3, 10, 11)
    torch.testing.assert_close(energy(x), torch.cat([energy(one[None]) for one in x]))


@every
def test_a_file_holds_it(name: str, tmp_path: Path) -> None:
    energy = make(name)
    save(tmp_path / "it.safetensors", energy, Card(name=name, data="none", command="none"))
    again, card = load_energy(tmp_path / "it.safetensors")
    x = images(2, 10, 11)
    torch.testing.assert_close(again(x), energy(x))
    assert again.settings() == energy.settings() and card.guarantee == energy.guarantee()


def test_flat_fields_cost_nothing_in_tdv_and_stay_flat() -> None:
    """But near the edge, as far as the network sees."""
    x = torch.full((1, 48, 49), 3.0, dtype=torch.float64)
    energy = make("tdv", squares=0.0)
    assert float(energy(x)) == pytest.approx(0.0, abs=1e-10)
    assert float(energy.gradient(x)[:, 18:-18, 18:-18].abs().max()) < 1e-10


# -- the layers and the bounds that they carry ---------------------------------------------------------------


@pytest.mark.parametrize("bend", [SOFT, RAMP, TANH, STUDENT])
def test_activations_have_the_bounds_that_they_say(bend: Bend) -> None:
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bend(z).sum(), z, create_graph=True)
    (turn,) = torch.autograd.grad(slope.sum(), z)
    assert float(bend(torch.zeros(1, dtype=torch.float64))) == pytest.approx(0.0, abs=1e-15)
    assert 0.99 * bend.slope <= float(slope.abs().max()) <= bend.slope
    assert 0.99 * bend.curvature <= float(turn.abs().max()) <= bend.curvature * (1 + 1e-12)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["same", "valid", "half", "back"])
def test_a_layer_carries_its_norm_and_the_reach_of_a_pixel(dim: int, kind: str) -> None:
    torch.manual_seed(0)
    stride = 2 if kind in ("half", "back") else 1
    layer = Layer((2, 3), 3, dim, stride, valid=kind == "valid", bias=False, back=kind == "back").double()
    grid = (6, 5, 5)[:dim]
    to = (11, 10, 9)[:dim]
    units = torch.eye(2 * torch.Size(grid).numel(), dtype=torch.float64).reshape(-1, 2, *grid)
    columns = layer(units, to).detach().flatten(2)
    norm = float(torch.linalg.matrix_norm(columns.flatten(1), 2))
    path = torch.tensor([0.7, 2.0], dtype=torch.float64)
    found = layer(Reach(1.5, path.requires_grad_()))
    assert norm <= found.lipschitz / 1.5 <= 1.6 * norm
    # every output channel's largest sum of |entries| of one pixel's column, as bounds of the adjoint
    sums = columns.abs().sum(2).reshape(2, -1, 3).amax(1)
    exact = path.detach() @ sums
    assert bool((exact <= found.path * (1 + 1e-12)).all()) and bool((found.path <= 1.7 * exact).all())


def test_curvature_of_a_sum_of_activations_of_one_layer_is_exact() -> None:
    """s2 max_c |w_c| ||K||^2 by hand."""
    torch.manual_seed(1)
    layer = Layer((1, 3), 3, valid=True, bias=False).double()
    w = torch.tensor([0.3, -2.0, 1.0])
    through = layer(Reach.of_images())
    expected = TANH.curvature * 2.0 * through.lipschitz**2
    assert TANH(through).curvature(w) == pytest.approx(expected, rel=1e-5)


# -- trained -------------------------------------------------------------------------------------------------


def scenes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Discs, and the same with noise."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.arange(20.0)
    centre = 6 + 8 * torch.rand(n, 2, 1, 1, generator=generator)
    radius = 3 + 4 * torch.rand(n, 1, 1, generator=generator)
    far = (line[:, None] - centre[:, 0]).square() + (line - centre[:, 1]).square()
    clean = (far < radius.square()).float()
    return clean, clean + 0.15 * torch.randn(clean.shape, generator=generator)


TRAINED: dict[str, Make] = {
    "icnn": lambda: ICNN(channels=6, layers=2),
    "adversarial": lambda: AdversarialNetwork(channels=6, layers=3),
    "nett": lambda: NETT(channels=6, scales=2),
    "tdv": lambda: TDV(channels=6, scales=2),
}


@every
def test_trained_energies_tell_noise_and_their_gradient_takes_it_away(name: str) -> None:
    torch.manual_seed(3)
    clean, noisy = scenes(128, 4)
    energy = TRAINED[name]()
    model: torch.nn.Module = Adversarial(energy)
    loss: Loss = Mean()
    data = pairs(clean, noisy)
    if isinstance(energy, TDV):
        model, data = Denoising(energy, 0.15), (clean, torch.zeros(len(clean)))
    elif isinstance(energy, NETT):
        model, loss, data = energy.network, SquaredError(), artefacts(clean, noisy)
    train(model, loss, data, Adam(1e-2, cosine=True), epochs=12, batch=16)
    clean, noisy = scenes(32, 5)
    with torch.no_grad():
        assert bool((energy(noisy) > energy(clean)).all())
    before = float((noisy - clean).norm())
    slope = energy.gradient(noisy).detach()
    steps = [t * 0.15 / float(slope.square().mean().sqrt()) for t in (0.25, 0.5, 0.75)]
    after = min(float((noisy - t * slope - clean).norm()) for t in steps)
    # NETT is trained to know what is wrong, not that its slope leads away from it
    assert after < (0.98 if isinstance(energy, NETT) else 0.92) * before


def test_require_fit_and_bad_settings() -> None:
    for name in SMALL:
        with pytest.raises(GliodeError, match="takes 2 axes"):
            Learned(make(name), Euclidean(16), (2, 8))
        with pytest.raises(GliodeError, match="takes 2 axes"):
            Learned(make(name), Euclidean(512), (8, 8, 8))
        with pytest.raises(GliodeError, match="squares"):
            SMALL[name](squares=-1.0)
        with pytest.raises(GliodeError, match="dim 4"):
            SMALL[name](dim=4)
    with pytest.raises(GliodeError, match="0 scales"):
        TDV(scales=0)
    with pytest.raises(GliodeError, match="0 scales"):
        NETT(scales=0)
    with pytest.raises(GliodeError, match="1 layers"):
        AdversarialNetwork(layers=1)
