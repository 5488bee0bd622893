"""Draw docs/pictures/mesh_regularizer.png: one learned regularizer on three meshes of a slab.

python scripts/draw_mesh_regularizer.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import dolfinx
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mpi4py import MPI
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inverse.regularizers.learned.energy import Learned
from inverse.regularizers.learned.mesh import MeshRidge
from solvers.fem import mesh
from solvers.fem.mesh import Domain, FloatArray
from solvers.fem.multiscale import Multiscale
from solvers.fem.sampling import Sampling

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
INK = "#1F2933"
COLOURS = ["#0072B2", "#009E73", "#D55E00", "#CC79A7"]
SIDES, SEED, STEP = np.array([48.0, 48.0, 12.0]), 0, 0.6


def bricks(h: float) -> Domain:
    return mesh.box(tuple(SIDES), tuple(int(side / h) for side in SIDES), MPI.COMM_SELF)  # type: ignore[arg-type]


def tetrahedra(h: float) -> Domain:
    """The slab in unequal tetrahedra of about h mm."""
    cells, whole = [int(side / h) for side in SIDES], [[0, 0, 0], SIDES.tolist()]
    made = dolfinx.mesh.create_box(MPI.COMM_SELF, whole, cells, ghost_mode=dolfinx.mesh.GhostMode.none)
    x = made.geometry.x
    at = x / SIDES
    x[:] = SIDES * (at + 0.06 * np.sin(2 * np.pi * at) * np.cos(np.pi * at[:, [1, 2, 0]]))
    return mesh.from_mesh(made)


def noisy(points: FloatArray) -> FloatArray:
    """Two plateaus and noise of a length of 5 mm, the same function on every mesh."""
    axis = np.arange(-2.0, 51.0, 2.0)
    rough = gaussian_filter(np.random.default_rng(SEED).standard_normal((len(axis),) * 3), 2.5 / 2)
    noise = RegularGridInterpolator((axis,) * 3, 0.25 * rough / rough.std())(points)
    first = np.linalg.norm(points[:, :2] - [18.0, 28.0], axis=1) < 13
    second = np.abs(points[:, :2] - [37.0, 12.0]).max(1) < 7
    return 1.0 * first + 0.6 * second + noise


def curves(ax: Axes, energy: MeshRidge) -> None:
    """The symbols of the bands of the values, and of the slopes of m itself, over the wavelength."""
    wavelength = np.geomspace(10, 400, 300)
    t = (2 * np.pi / wavelength) ** 2
    f = [1 / (1 + length**2 * t) for length in energy.lengths] + [0 * t]
    for k, (length, colour) in enumerate(zip(energy.lengths, COLOURS, strict=True)):
        after = f"$S_{{{energy.lengths[k + 1]:g}}}$" if k + 1 < len(energy.lengths) else ""
        name = f"$S_{{{length:g}}}$" + (f" $-$ {after}" if after else "")
        ax.semilogx(wavelength, f[k] - f[k + 1], color=colour, lw=2, label=name)
    ax.set(xlabel="wavelength (mm)", ylim=(0, 1), title="bands, lengths in mm")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def draw(out: Path) -> None:
    energy = MeshRidge((0.0, 4.0, 8.0, 16.0), [(1.0, 0.0, 0.03), (0.5, 4.0, 0.03)], [(0.01, 8.0, 0.1)])
    meshes = {
        "bricks, 6 mm": bricks(6.0),
        "bricks, 3 mm": bricks(3.0),
        "tetrahedra, about 4 mm": tetrahedra(4.0),
    }
    side = np.linspace(0.5, 47.5, 95)
    x, y = np.meshgrid(side, side, indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.full(x.size, 6.0)], axis=1)
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, width_ratios=[1.25, 1, 1, 1])
    curves(figure.add_subplot(grid[:, 0]), energy)
    found = []
    for column, (name, domain) in enumerate(meshes.items(), 1):
        operators = Multiscale(domain, energy.lengths)
        learned = Learned(energy.on(operators), operators.space, tolerance=1e-3)
        m = domain.interpolate(noisy)
        value = float(learned(m)) / 1000
        rows = {f"{name}\nR = {value:.1f} x 10$^3$": m, "its prox": learned.prox(m, STEP)}
        sampling = Sampling(domain, points)
        for row, (title, u) in enumerate(rows.items()):
            picture = sampling(u).numpy().reshape(x.shape)
            ax = figure.add_subplot(grid[row, column])
            image = ax.imshow(picture.T, origin="lower", vmin=-0.4, vmax=1.4, cmap="viridis")
            ax.set_title(title, fontsize=9, color=INK)
            ax.axis("off")
        found.append(picture)
        print(name, domain.n_global, f"R = {value:.3f}, of the prox {float(learned(u)) / 1000:.3f} x 10^3")
    figure.colorbar(image, ax=figure.axes[1:], shrink=0.6)
    for other in found[1:]:
        print("apart from the first:", float(np.sqrt(np.mean((other - found[0]) ** 2))))
    figure.savefig(out / "mesh_regularizer.png", dpi=85)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    torch.set_num_threads(1)
    draw(parser.parse_args().out)
