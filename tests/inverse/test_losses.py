"""Losses against their formulas written out in NumPy, their gradients against differences, and accuracy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.losses import ClassLoss, CrossEntropy, LogError, Mean, SquaredError, SquaredLoss
from solvers.errors import GliodeError

LABELS = torch.tensor([0, 2, 1, 2, 0])
BINARY = torch.tensor([0, 1, 1, 0, 1])
Array = np.ndarray


def scores(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(5, columns, dtype=torch.float64, generator=generator)


def sigmoid(s: Array) -> Array:
    return 1 / (1 + np.exp(-s))


def one_hot(labels: Tensor, off: float, on: float) -> Array:
    return np.where(np.arange(3) == labels.numpy()[:, None], on, off)


def column(labels: Tensor, off: float, on: float) -> Array:
    return np.where(labels.numpy()[:, None] == 1, on, off)


def softmax_entropy(s: Array) -> float:
    return float(np.mean(np.log(np.exp(s).sum(1)) - s[np.arange(5), LABELS.numpy()]))


def half_square(r: Array) -> float:
    return float((r**2).sum()) / 10


CASES: dict[str, tuple[ClassLoss, Tensor, Callable[[Array], float]]] = {
    "one-hot": (SquaredLoss(3), LABELS, lambda s: half_square(s - one_hot(LABELS, 0, 1))),
    "modified": (SquaredLoss(3, -1, 1), LABELS, lambda s: half_square(s - one_hot(LABELS, -1, 1))),
    "sigmoids": (
        SquaredLoss(3, 0.1, 0.9, "sigmoid"),
        LABELS,
        lambda s: half_square(sigmoid(s) - one_hot(LABELS, 0.1, 0.9)),
    ),
    "one sigmoid": (
        SquaredLoss(1, hypothesis="sigmoid"),
        BINARY,
        lambda s: half_square(sigmoid(s) - column(BINARY, 0, 1)),
    ),
    "one score": (SquaredLoss(1, -1, 1), BINARY, lambda s: half_square(s - column(BINARY, -1, 1))),
    "entropy": (CrossEntropy(3), LABELS, softmax_entropy),
    "one entropy": (
        CrossEntropy(1),
        BINARY,
        lambda s: float(np.mean(np.log1p(np.exp(-s[:, 0] * column(BINARY, -1, 1)[:, 0])))),
    ),
    "small scores": (
        SquaredLoss(3, magnitude=0.4),
        LABELS,
        lambda s: half_square(s - one_hot(LABELS, 0, 1)) + 0.4 * half_square(s),
    ),
    "small entropy": (
        CrossEntropy(3, magnitude=0.4),
        LABELS,
        lambda s: softmax_entropy(s) + 0.4 * half_square(s),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    loss, labels, formula = CASES[name]
    s = scores(loss.scores).requires_grad_()
    value = loss(s, labels)
    assert value.shape == () and float(value) == pytest.approx(formula(s.detach().numpy()), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, s)
    d = torch.cos(torch.arange(float(s.numel()))).view_as(s).double()
    h = 1e-6
    plus, minus = (s.detach() + sign * h * d for sign in (1, -1))
    difference = (formula(plus.numpy()) - formula(minus.numpy())) / (2 * h)
    assert float((gradient * d).sum()) == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("name", [name for name, (loss, _, _) in CASES.items() if "entropy" not in name])
def test_half_the_squared_residual_is_the_loss(name: str) -> None:
    loss, labels, formula = CASES[name]
    assert isinstance(loss, SquaredLoss)
    r = loss.residual(scores(loss.scores), labels)
    assert half_square(r.numpy()) == pytest.approx(formula(scores(loss.scores).numpy()), rel=1e-12)


def test_predictions_are_the_nearest_targets() -> None:
    s = torch.tensor([[0.1, 0.7, 0.3], [2.0, -1.0, 0.0], [0.0, 0.2, 0.1], [0.3, 0.1, 0.9]])
    labels = torch.tensor([1, 0, 2, 2])
    for loss in (SquaredLoss(3), CrossEntropy(3)):
        assert loss.predict(s).tolist() == [1, 0, 1, 2]
        assert loss.measure(s, labels) == 0.75
    one = torch.tensor([[-0.6], [-0.1], [0.4], [0.6]])
    assert CrossEntropy(1).predict(one).tolist() == [0, 0, 1, 1]
    for off, on, hypothesis in ((0, 1, None), (-1, 1, None), (0, 1, "sigmoid"), (0.2, 1.0, "sigmoid")):
        value = one if hypothesis is None else torch.sigmoid(one)
        nearest = ((value[:, 0] - on).abs() < (value[:, 0] - off).abs()).long()
        assert torch.equal(SquaredLoss(1, off, on, hypothesis).predict(one), nearest)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SquaredLoss(0), "0 scores"),
        (lambda: SquaredLoss(3, 1.0, 0.0), "off < on"),
        (lambda: SquaredLoss(3, hypothesis="tanh"), "'tanh'"),
        (lambda: SquaredLoss(1, -3.0, 1.0, "sigmoid"), "sigmoid is in"),
        (lambda: CrossEntropy(3, magnitude=-1.0), "magnitude"),
        (lambda: CrossEntropy(3)(scores(2), LABELS), r"\(5, 2\).*\(n, 3\)"),
        (lambda: SquaredLoss(2).require_fit(scores(2), LABELS), "from 0 to 2.*classes 0 to 1"),
        (lambda: SquaredLoss(3).require_fit(scores(3), LABELS.double()), "float64"),
        (lambda: SquaredLoss(3).require_fit(scores(3), LABELS[:4]), r"\(4,\) for 5 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(GliodeError, match=words):
        make()


def test_of_fields_and_of_costs() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    apart = x.numpy() - y.numpy()
    assert float(SquaredError()(x, y)) == pytest.approx(float((apart**2).sum()) / 6)
    assert SquaredError().measure(x, y) == pytest.approx(
        float(np.linalg.norm(apart) / np.linalg.norm(y.numpy()))
    )
    each = (apart.reshape(3, -1) ** 2).mean(1)
    assert float(LogError()(x, y)) == pytest.approx(float(np.log(each + 1e-6).mean()) / 2)
    assert LogError().measure(x, y) == pytest.approx(float(-10 * np.log10(each).mean()))
    assert float(Mean()(x[:, 0, :1], y)) == pytest.approx(float(x.numpy()[:, 0, 0].mean()))
    with pytest.raises(GliodeError, match="one such for each input"):
        SquaredError()(x, y[:, 0])
    with pytest.raises(GliodeError, match="return \\(n, 1\\)"):
        Mean()(x[:, 0], y)
