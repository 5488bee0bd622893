"""Training: closed forms, torch's own loop, honest counts, resumption to the same numbers, ways to stop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inverse import checkpoints
from inverse.batch_problems import BatchProblems, batches
from inverse.losses import CrossEntropy, Loss, SquaredLoss
from inverse.methods import SGD, Adam, ConjugateGradients, Landweber, Method, QuasiNewton
from inverse.problem import Composite, LeastSquares
from inverse.training import Data, Training, evaluate, train
from solvers.errors import GliodeError
from solvers.node.fields import Standalone
from solvers.node.models import Node
from solvers.ode.integrate import Noise


def data(n: int = 40, seed: int = 0) -> Data:
    """Three classes in R^3 that a linear map does not separate."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, (x + 0.3 * x[:, [1, 2, 0]] ** 2).argmax(1)


def linear(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, outputs, bias=False).double()


def network(noise: float = 0.0) -> nn.Module:
    """A standalone network of 15 weights in depth, and a classifier."""
    torch.manual_seed(1)
    field = Standalone(3, knots=3)
    field.reset(1.0, 0.5)
    injected = Noise(noise, generator=torch.Generator()) if noise else None
    return nn.Sequential(Node(field, steps=4, scheme="heun", noise=injected), nn.Linear(3, 3)).double()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def numbers(run: Training) -> list[dict[str, float]]:
    """The history but for the time."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.history]


def one_hot(labels: Tensor) -> np.ndarray:
    return np.eye(3)[labels.numpy()]


# -- the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_step_of_conjugate_gradients_is_the_lowest_point_along_the_gradient(decay: float) -> None:
    model, (x, labels) = linear(), data()
    W, X, Y = model.get_parameter("weight").detach().numpy().copy(), x.numpy(), one_hot(labels)
    method = ConjugateGradients(steps=1)
    run = train(model, SquaredLoss(3), (x, labels), method, epochs=1, decay=decay)
    g = (X @ W.T - Y).T @ X / 40 + decay * W
    eta = (g**2).sum() / (((X @ g.T) ** 2).sum() / 40 + decay * (g**2).sum())
    np.testing.assert_allclose(weights(model).view(3, 3).numpy(), W - eta * g, rtol=1e-12)
    value = ((X @ W.T - Y) ** 2).sum() / 80 + decay / 2 * (W**2).sum()
    assert run.history[0]["objective"] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("method", [ConjugateGradients("FR", 9), QuasiNewton(steps=15), Landweber(steps=150)])
def test_the_full_batch_leads_to_the_ridge_regression(method: Method) -> None:
    """Of 9 weights: 9 steps of conjugate gradients, whose memory goes on over 3 epochs of 3 steps."""
    model, (x, labels) = linear(), data()
    X, Y = x.numpy(), one_hot(labels)
    exact = np.linalg.solve(X.T @ X / 40 + 0.1 * np.eye(3), X.T @ Y / 40).T
    in_parts = type(method)(**{**vars(method), "steps": method.steps // 3})  # type: ignore[union-attr]
    train(model, SquaredLoss(3), (x, labels), in_parts, epochs=3, decay=0.1)
    np.testing.assert_allclose(weights(model).view(3, 3).numpy(), exact, atol=1e-7)


def test_memory_is_carried_from_epoch_to_epoch_on_the_full_batch() -> None:
    """Six epochs of one step are one epoch of six: conjugate gradients are not begun anew."""
    paths = []
    for epochs, steps in ((6, 1), (1, 6)):
        model = network()
        train(model, SquaredLoss(3), data(), ConjugateGradients(steps=steps), epochs=epochs, length=0.5)
        paths.append(weights(model))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [Adam(0.02), Adam(0.02, cosine=True), SGD(0.5, momentum=0.8, cosine=True)])
def test_torch_optimizers_do_what_a_plain_loop_does(method: Adam | SGD) -> None:
    model, plain, (x, labels) = network(), network(), data()
    train(model, CrossEntropy(3), (x, labels), method, epochs=3, batch=10, seed=5)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(plain.parameters(), lr=0.02)
    if isinstance(method, SGD):
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for epoch in range(3):
        for rows in batches(40, 10, 5, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x[rows]), labels[rows]).backward()
            optimizer.step()
            if method.cosine:
                schedule.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [SquaredLoss(3, -1, 1, magnitude=0.1), CrossEntropy(3)])
def test_the_objective_of_a_batch_and_its_gradient(loss: Loss) -> None:
    """The loss on the batch's rows, plus the weights' norm in H1; gradients against differences."""
    model, (x, labels) = network(), data()
    problems = BatchProblems(model, loss, (x, labels), batch=20, length=0.3, decay=0.2, seed=3)
    second = list(problems.of(4))[1]
    assert isinstance(second, LeastSquares if isinstance(loss, SquaredLoss) else Composite)
    rows = batches(40, 20, 3, 4)[1]
    m = problems.parameters.pack()
    norm = problems.parameters.space.norm(m)
    expected = float(loss(model(x[rows]), labels[rows])) + 0.1 * norm**2
    value, gradient = second.value_and_gradient(m)
    assert value == pytest.approx(expected, rel=1e-12)
    d = torch.cos(torch.arange(len(m))).double()
    h = 1e-6
    difference = (second.value(m + h * d) - second.value(m - h * d)) / (2 * h)
    assert float(gradient @ d) == pytest.approx(difference, rel=1e-7)


def test_a_length_scale_makes_weights_smoother() -> None:
    rough = []
    for length in (0.0, 1.0):
        model = network()
        train(model, SquaredLoss(3), data(), ConjugateGradients(steps=10), epochs=1, length=length)
        change = model.get_parameter("0.field.W.values") - network().get_parameter("0.field.W.values")
        rough.append(float(change.detach().diff(dim=0).norm() / change.detach().norm()))
    assert rough[1] < 0.3 * rough[0]


# -- batches and what is drawn -------------------------------------------------------------------------------


def test_batches_are_a_permutation_of_the_seed_and_the_epoch() -> None:
    parts = [rows for rows in batches(43, 10, 7, 2) if rows is not None]
    assert sorted(map(len, parts)) == [10, 11, 11, 11]
    assert sorted(torch.cat(parts).tolist()) == list(range(43))
    torch.rand(1)
    again = batches(43, 10, 7, 2)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True) if b is not None)
    others = [batches(43, 10, 7, 3)[0], batches(43, 10, 8, 2)[0]]
    assert not any(torch.equal(parts[0], other) for other in others if other is not None)
    assert batches(43, 22, 7, 2) == batches(43, None, 7, 2) == [None]


@pytest.mark.parametrize("kind", ["noise", "dropout"])
def test_what_the_model_draws_is_fixed_on_a_batch_and_new_on_the_next(kind: str) -> None:
    dropout = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)).double()
    model = network(noise=0.3) if kind == "noise" else dropout
    problems = BatchProblems(model, CrossEntropy(3), data(), seed=1)
    m = problems.parameters.pack()
    model.train()
    before = torch.get_rng_state()
    (first,), (again,), (next_epoch,) = (list(problems.of(epoch)) for epoch in (0, 0, 1))
    value = first.value(m)
    assert value == first.value(m) == again.value(m) != next_epoch.value(m)
    assert torch.equal(before, torch.get_rng_state())
    model.eval()
    assert first.value(m) == next_epoch.value(m) != value


# -- counts --------------------------------------------------------------------------------------------------


class _Counted(torch.autograd.Function):
    calls = {"forward": 0, "adjoint": 0, "tangent": 0}  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Counted.calls["forward"] += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _Counted.calls["adjoint"] += 1
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _Counted.calls["tangent"] += 1
        return tangents[0].clone()


class Counting(nn.Module):
    """A layer that counts the solves that go through it while training."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Counted.apply(x) if self.training else x
        return out


@pytest.mark.parametrize("loss", [SquaredLoss(3), CrossEntropy(3)], ids=["squares", "entropy"])
@pytest.mark.parametrize("method", [ConjugateGradients(steps=3), QuasiNewton(steps=3), Landweber(), Adam()])
@pytest.mark.parametrize("batch", [None, 10])
def test_the_counts_are_what_the_model_sees(method: Method, loss: Loss, batch: int | None) -> None:
    model = nn.Sequential(network(), Counting())
    _Counted.calls.update(forward=0, adjoint=0, tangent=0)
    run = train(model, loss, data(), method, epochs=2, batch=batch, validation=data(20, 9))
    seen, visits = dict(_Counted.calls), 2 if batch is None else 8
    assert run.counts["forward"] == seen["forward"]
    if isinstance(method, Landweber) and isinstance(loss, CrossEntropy):
        return  # begun by second derivatives, in which one pass back is a tangent and an adjoint solve
    assert run.counts == seen == {name: run.history[-1][name] for name in seen}
    if isinstance(method, ConjugateGradients) and isinstance(loss, SquaredLoss):
        # An entropy may become so small on ten inputs that a visit ends early.
        assert run.counts["adjoint"] == visits * (3 + 1) and run.counts["tangent"] == visits * 3
    if isinstance(method, Adam):
        assert run.counts == {"forward": visits, "adjoint": visits, "tangent": 0}


@pytest.mark.parametrize("method", [ConjugateGradients(steps=3), Adam()])
@pytest.mark.parametrize("most", [9, 10, 11, 12])
def test_no_more_gradients_than_allowed(method: Method, most: int) -> None:
    """Visits of 4 gradients each: a rest of 2 or 3 makes a shorter visit, a rest of 1 none."""
    run = train(network(), SquaredLoss(3), data(), method, epochs=50, batch=10, max_gradients=most)
    wasted = most == 9 and isinstance(method, ConjugateGradients)
    assert run.counts["adjoint"] == most - wasted
    assert run.stopped_by == "max_gradients"


# -- going on ------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[Method, int | None]] = {
    "conjugate gradients": (ConjugateGradients(steps=2), None),
    "conjugate gradients on batches": (ConjugateGradients("DY", steps=2), 10),
    "quasi-Newton": (QuasiNewton(memory=3, steps=2), None),
    "Landweber on batches": (Landweber(), 10),
    "Adam": (Adam(0.01, cosine=True), 10),
    "SGD": (SGD(0.1, momentum=0.9), 10),
}


class Breaks(nn.Module):
    """Interrupts at the given call of training."""

    def __init__(self) -> None:
        super().__init__()
        self.left = -1

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        if self.left == 0:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_interrupted_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    """With noise in the model and float32, whose every rounding must be the same too."""
    method, batch = METHODS[name]
    loss = CrossEntropy(3)

    def go(model: nn.Module, **options: Any) -> Training:
        parts = [tuple(t.float() if t.is_floating_point() else t for t in data(40, s)) for s in (0, 9)]
        settings: dict[str, Any] = {"epochs": 6, "batch": batch, "length": 0.5, "decay": 1e-3, "seed": 2}
        return train(model, loss, parts[0], method, validation=parts[1], patience=6, **settings, **options)  # type: ignore[arg-type]

    whole = nn.Sequential(network(noise=0.1), Breaks()).float()
    expected = go(whole)
    assert expected.stopped_by == "epochs" and expected.kept_epoch > 0

    broken = nn.Sequential(network(noise=0.1), Breaks()).float()
    breaks = broken[1]
    assert isinstance(breaks, Breaks)
    breaks.left = round(0.6 * (expected.counts["forward"]))
    cut = go(broken, folder=tmp_path, checkpoint_every=2)
    assert cut.stopped_by == "interrupted" and 0 < len(cut.history) < 6
    assert numbers(cut) == numbers(expected)[: len(cut.history)]

    fresh: Any = nn.Sequential(network(noise=0.1), Breaks()).float()
    nn.init.zeros_(fresh[0][1].weight)  # the checkpoint's, not the model's
    resumed = go(fresh, folder=tmp_path, resume=True)
    assert numbers(resumed) == numbers(expected)
    assert (resumed.stopped_by, resumed.kept_epoch) == (expected.stopped_by, expected.kept_epoch)
    assert torch.equal(weights(fresh), weights(whole))
    again = go(fresh, folder=tmp_path, resume=True)
    assert numbers(again) == numbers(expected) and torch.equal(weights(fresh), weights(whole))


def test_an_interruption_keeps_what_is_done() -> None:
    """In the second of four batches of the third epoch: the weights after the first are there."""
    models = [nn.Sequential(network(), Breaks()) for _ in range(2)]
    breaks = models[0][1]
    assert isinstance(breaks, Breaks)
    breaks.left = 2 * 4 + 2
    options: dict[str, Any] = {"epochs": 9, "batch": 10}
    cut = train(models[0], SquaredLoss(3), data(), Adam(0.1), **options)
    assert cut.stopped_by == "interrupted" and len(cut.history) == 2 and cut.counts["adjoint"] == 9
    train(models[1], SquaredLoss(3), data(), Adam(0.1), max_gradients=9, **options)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_a_resumed_run_goes_on_beyond_the_first_end_and_so_do_its_curves(tmp_path: Path) -> None:
    models = [network(), network()]
    method = ConjugateGradients(steps=2)
    run = train(models[0], SquaredLoss(3), data(), method, epochs=5)
    for epochs in (2, 5):
        train(models[1], SquaredLoss(3), data(), method, epochs=epochs, folder=tmp_path, resume=True)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert curve(tmp_path, "adjoint") == [(entry["epoch"], entry["adjoint"]) for entry in run.history]
    train(network(), SquaredLoss(3), data(), method, epochs=1, folder=tmp_path)
    assert curve(tmp_path, "adjoint") == [(1, run.history[0]["adjoint"])]


def test_the_bar_counts_batches(capsys: pytest.CaptureFixture[str]) -> None:
    train(network(), SquaredLoss(3), data(), Adam(), epochs=3, batch=10, validation=data(), progress=True)
    shown = capsys.readouterr()
    assert "12/12" in shown.err and "validation" in shown.err and not shown.out


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_only_plain_files_and_curves_are_written(tmp_path: Path) -> None:
    model = network()
    run = train(model, SquaredLoss(3), data(), Adam(), epochs=3, validation=data(20, 9), folder=tmp_path)
    kinds = sorted(path.suffix for path in tmp_path.iterdir() if path.is_file())
    assert kinds == [".json", ".safetensors", ".safetensors"]
    assert json.loads((tmp_path / "checkpoint.json").read_text())["history"] == run.history
    other = network()
    nn.init.zeros_(other[1].weight)  # type: ignore[index]
    checkpoints.read_weights(tmp_path / "weights.safetensors", other)
    assert torch.equal(weights(model), weights(other))
    expected = [(k + 1, np.float32(entry["validation_loss"])) for k, entry in enumerate(run.history)]
    assert curve(tmp_path, "validation_loss") == expected


def test_a_crash_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write_checkpoint(tmp_path, {"a": torch.ones(2)}, {"epoch": 1, "loss": float("nan")})
    monkeypatch.setattr(checkpoints, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_checkpoint(tmp_path, {"a": torch.zeros(2)}, {"epoch": 2})
    found = checkpoints.read_checkpoint(tmp_path)
    assert found is not None and found[0]["a"].tolist() == [1, 1] and found[1] == {"epoch": 1, "loss": None}


# -- ways to stop --------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights() -> None:
    """Sixteen points are soon learned by heart."""
    model, held_out, loss = network(), data(200, 9), CrossEntropy(3)
    method = ConjugateGradients(steps=5)
    run = train(model, loss, data(16), method, epochs=200, validation=held_out, patience=4)
    curve = [entry["validation_loss"] for entry in run.history]
    assert run.stopped_by == "patience" and len(curve) == run.kept_epoch + 4
    assert min(curve) == curve[run.kept_epoch - 1] < curve[-1]
    assert evaluate(model, loss, held_out)[0] == pytest.approx(min(curve), rel=1e-12)
    assert not model.training


def test_an_objective_that_is_not_finite_ends_the_run_with_the_best_weights(tmp_path: Path) -> None:
    model, seen = network(), []
    loss = SquaredLoss(3)

    def explode(entry: dict[str, float], model: nn.Module) -> None:
        seen.append(weights(model))
        if entry["epoch"] == 3:
            with torch.no_grad():
                x.mul_(float("nan"))

    x, labels = data()
    run = train(model, loss, (x, labels), Adam(), epochs=9, callback=explode, folder=tmp_path)
    assert run.stopped_by == "NonFinite" and "epoch 3 are kept" in run.note
    assert torch.equal(weights(model), seen[2])
    saved = checkpoints.read_tensors(tmp_path / "weights.safetensors")
    assert torch.equal(torch.cat([saved[name].reshape(-1) for name, _ in model.named_parameters()]), seen[2])
    wild = network()
    start = weights(wild)
    run = train(wild, loss, data(), SGD(1e200), epochs=9)
    assert run.stopped_by == "NonFinite" and run.kept_epoch in (0, 1)
    assert run.kept_epoch or torch.equal(weights(wild), start)
    assert bool(torch.isfinite(weights(wild)).all())


def test_the_full_batch_ends_where_no_step_lowers_the_objective() -> None:
    model, (x, labels) = linear(), data()
    run = train(model, SquaredLoss(3), (x, labels), ConjugateGradients(steps=5), epochs=500)
    assert run.stopped_by == "GradientTolerance" and len(run.history) < 6
    exact = np.linalg.lstsq(x.numpy(), one_hot(labels))[0].T
    np.testing.assert_allclose(weights(model).view(3, 3).numpy(), exact, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be 1"),
        ({"batch": 0}, "batch must be 1"),
        ({"max_gradients": 1}, "max_gradients must be 2"),
        ({"patience": 3}, "needs validation data"),
        ({"resume": True}, "needs the folder"),
        ({"decay": -1.0}, "weight must be positive"),
        ({"seed": -1}, "seed"),
        ({"method": ConjugateGradients(steps=0)}, "steps must be 1"),
        ({"method": Adam(lr=0.0)}, "lr must be positive"),
        ({"loss": SquaredLoss(4)}, r"\(2, 3\).*\(n, 4\)"),
        ({"data": (data()[0].float(), data()[1])}, "data: torch.float32.*the model is.*float64"),
        ({"data": (data()[0], data()[1][:7])}, "40 inputs, 7 labels"),
        ({"data": (data()[0] / 0, data()[1])}, "NaN or infinite"),
        ({"validation": (data()[0], data()[1] + 1)}, "classes 0 to 2"),
        ({"model": network().requires_grad_(False)}, "nothing to train"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(options: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"model": network(), "loss": SquaredLoss(3), "data": data(), "epochs": 1}
    with pytest.raises(GliodeError, match=words):
        train(**{**settings, **options})


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    def go(model: nn.Module, **options: Any) -> Training:
        settings: dict[str, Any] = {"epochs": 2, "batch": 10, "folder": tmp_path, **options}
        return train(model, SquaredLoss(3), settings.pop("data", data()), Adam(), **settings)

    go(network(), key="one")
    for options, words in (
        ({"batch": 20, "seed": 4}, "different in key, batch, seed"),
        ({"key": "one", "data": data(seed=4)}, "different in data"),
    ):
        with pytest.raises(GliodeError, match=words):
            go(network(), resume=True, **options)
    with pytest.raises(GliodeError, match="weights of another model"):
        go(linear(), resume=True, key="one")
    (tensors,) = tmp_path.glob("checkpoint-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(GliodeError, match=r"damaged.*train anew"):
        go(network(), resume=True, key="one")
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(GliodeError, match=r"checkpoint.json: damaged"):
        go(network(), resume=True, key="one")
    assert go(network(), key="two").stopped_by == "epochs"
