"""Pictures of a trained network: curves, the plane as it sees it, states on their way, learned time steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from inverse.losses import ClassLoss
from solvers.node.models import Node

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f6fb4", "#d9541e")  # of label 0 and 1
POINTS = 800  # drawn of a set


def draw(
    folder: Path,
    title: str,
    model: nn.Sequential,
    loss: ClassLoss,
    test: tuple[Tensor, Tensor],
    history: list[Any],
) -> list[Path]:
    """All pictures that the network has, as PNG in folder/pictures.

    model: lift, block, classifier; test: inputs and labels.
    """
    inputs, labels = test[0][:POINTS], test[1][:POINTS]
    made = {"curves": curves(title, history)} if history else {}
    if inputs.shape[1] == 2:
        made["prediction"] = prediction(title, model, loss, inputs, labels)
        made["states"] = states(title, model, loss, inputs, labels)
    block = model.get_submodule("block")
    if isinstance(block, Node) and block.free_steps is not None:
        made["time_steps"] = time_steps(title, block)
    from matplotlib import pyplot

    folder = folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in made.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
        pyplot.close(figure)
    return paths


def curves(title: str, history: Sequence[dict[str, float]]) -> Any:
    """Objective, validation loss and validation accuracy over the gradients spent."""
    from matplotlib import pyplot

    spent = [entry["adjoint"] for entry in history]
    watched = "validation_loss" in history[0]
    figure, axes = pyplot.subplots(
        1, 2 if watched else 1, figsize=(9 if watched else 5, 3.6), squeeze=False, layout="constrained"
    )
    mark = "o" if len(spent) < 40 else None
    left = axes[0, 0]
    left.plot(
        spent, [e["objective"] for e in history], marker=mark, ms=3, label="objective before each visit"
    )
    if watched:
        left.plot(spent, [e["validation_loss"] for e in history], marker=mark, ms=3, label="validation loss")
        right = axes[0, 1]
        right.plot(spent, [100 * e["validation_accuracy"] for e in history], marker=mark, ms=3, color="C2")
        right.set(xlabel="gradients", ylabel="validation accuracy [%]")
        right.grid(alpha=0.3)
    left.set(xlabel="gradients", yscale="log")
    left.grid(alpha=0.3, which="both")
    left.legend(frameon=False)
    figure.suptitle(title)
    return figure


def prediction(title: str, model: nn.Module, loss: ClassLoss, inputs: Tensor, labels: Tensor) -> Any:
    """How sure the network is of label 1 over the plane, and test points."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 4.6), layout="constrained")
    _plane(axes, model, loss, inputs)
    _scatter(axes, inputs, labels)
    right = loss.measure(_outputs(model, inputs), labels)
    axes.set(
        title=f"{title}: {100 * right:.1f} % of {len(labels)} test points", xlabel="$x_1$", ylabel="$x_2$"
    )
    axes.legend(loc="upper right", framealpha=0.8)
    return figure


def states(title: str, model: nn.Sequential, loss: ClassLoss, inputs: Tensor, labels: Tensor) -> Any:
    """The first two components of the test points' states at the start, on the way, and at the end.

    Where the state is a plane, the end also shows what the classifier makes of it.
    """
    from matplotlib import pyplot

    lift, block, classifier = (model.get_submodule(name) for name in ("lift", "block", "classifier"))
    with torch.no_grad():
        path = block(lift(inputs), trajectory=True)
    times = block.times().tolist() if isinstance(block, Node) else list(range(len(path)))
    places = np.linspace(0, len(path) - 1, 4).round().astype(int).tolist()
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.5), layout="constrained")
    for axis, place in zip(axes, places, strict=True):
        state = path[place]
        if place == places[-1] and state.shape[1] == 2:
            _plane(axis, classifier, loss, state)
        _scatter(axis, state[:, :2], labels)
        axis.set(title=f"{place} layers, t = {float(times[place]):.3g}", xlabel="$x_1$")
    axes[0].set(ylabel="$x_2$")
    figure.suptitle(title)
    return figure


def time_steps(title: str, block: Node) -> Any:
    """The learned time steps, layer by layer."""
    from matplotlib import pyplot

    h = block.times().detach().diff().cpu().numpy()
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.bar(np.arange(1, len(h) + 1), h, color="C0")
    axes.axhline(block.duration / len(h), color="grey", ls="--", lw=1, label="equal steps")
    share = np.cumsum(np.sort(h)[::-1]) / h.sum()
    few = int(np.searchsorted(share, 0.9)) + 1
    axes.set(
        title=f"{title}: {few} of {len(h)} layers take 90 % of the time", xlabel="layer $n$", ylabel="$h_n$"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return figure


def _outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(inputs)
    return out


def _certainty(loss: ClassLoss, scores: Tensor) -> Tensor:
    """How far the scores are on the side of label 1, in (-1, 1)."""
    margin = scores[:, 1] - scores[:, 0] if loss.scores > 1 else scores[:, 0] - loss.threshold()
    return torch.tanh(margin / margin.abs().median())


def _plane(axes: Axes, module: nn.Module, loss: ClassLoss, points: Tensor) -> None:
    """What a map of the plane to scores says around some points, and where it changes its mind."""
    from matplotlib.colors import LinearSegmentedColormap

    low, high = points.amin(0), points.amax(0)
    room = 0.08 * (high - low)
    low, high = low - room, high + room
    x, y = (np.linspace(float(a), float(b), 200) for a, b in zip(low, high, strict=True))
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)).to(points)
    found = _certainty(loss, _outputs(module, grid)).reshape(200, 200).cpu().numpy()
    colours = LinearSegmentedColormap.from_list("labels", [COLOURS[0], "white", COLOURS[1]])
    extent = (x[0], x[-1], y[0], y[-1])
    axes.imshow(
        found,
        origin="lower",
        extent=extent,
        vmin=-1,
        vmax=1,
        cmap=colours,
        alpha=0.45,
        aspect="auto",
        interpolation="bilinear",
    )
    if found.min() < 0 < found.max():
        axes.contour(x, y, found, levels=[0.0], colors="black", linewidths=1.2)


def _scatter(axes: Axes, points: Tensor, labels: Tensor) -> None:
    for label, colour in enumerate(COLOURS):
        own = points[labels == label].cpu().numpy()
        axes.scatter(own[:, 0], own[:, 1], s=6, color=colour, lw=0, alpha=0.8, label=f"label {label}")
