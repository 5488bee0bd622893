#!/usr/bin/env python3
"""Draw docs/pictures/flow.png: the vortex street of the DFG cylinder 2D-2, its speed and its vorticity.

scripts/env python scripts/draw_flow.py [--cells 16] [--duration 5] [--out docs/pictures/flow.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import dolfinx
import pyvista
import torch
import ufl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.equation_rows.flow import Cylinder, shedding
from solvers.fem.equations.cylinder import LENGTH
from tumour.pictures import style

WINDOW = [960, 416]


def main() -> None:
    """Run the flow until it is periodic, and draw its last state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=16, help="along a quarter of the cylinder")
    parser.add_argument("--duration", type=float, default=5.0, help="seconds of the flow")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/flow.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    channel = Cylinder(options.cells)
    u = channel.space.zeros()
    with torch.no_grad():
        for _, state, _ in shedding(channel, 1 / (140 * options.cells), options.duration):
            u = state
    draw(channel, u, options.out)


def draw(channel: Cylinder, u: Tensor, path: Path) -> None:
    """Both panels, one above the other."""
    flow = channel.space.function(u)
    velocity = ufl.split(flow)[0]
    panels = {
        "Speed": (ufl.sqrt(ufl.inner(velocity, velocity)), "viridis", (0.0, 2.2)),
        "Vorticity": (velocity[1].dx(0) - velocity[0].dx(1), style.OFFSET, (-40.0, 40.0)),
    }
    plotter: Any = pyvista.Plotter(off_screen=True, shape=(2, 1), window_size=WINDOW, border=False)
    for row, (name, (value, colours, limits)) in enumerate(panels.items()):
        plotter.subplot(row, 0)
        plotter.add_mesh(
            surface(channel.space.mesh, value),
            cmap=colours,
            clim=limits,
            show_scalar_bar=False,
            lighting=False,
        )
        plotter.add_text(name, position=(0.015, 0.9), viewport=True, font_size=8, color=style.INK)
        plotter.set_background(style.PAPER)
        plotter.view_xy()
        plotter.camera.parallel_projection = True
        plotter.camera.parallel_scale = 0.5 * WINDOW[1] / 2 / WINDOW[0] * 1.03 * LENGTH
        plotter.camera.focal_point = (LENGTH / 2, 0.225, 0.0)
        plotter.camera.position = (LENGTH / 2, 0.225, 1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    plotter.screenshot(path)
    plotter.close()
    print(path)


def surface(mesh: dolfinx.mesh.Mesh, value: Any) -> Any:
    """The channel with an expression on it, cell by cell quadratic."""
    V = dolfinx.fem.functionspace(mesh, ("DG", 2))
    points = V.element.interpolation_points  # a method until DOLFINx 0.10
    f = dolfinx.fem.Function(V)
    f.interpolate(dolfinx.fem.Expression(value, points() if callable(points) else points))
    grid = pyvista.UnstructuredGrid(*dolfinx.plot.vtk_mesh(V))
    grid.point_data["value"] = f.x.array
    return grid.extract_surface(nonlinear_subdivision=2)


if __name__ == "__main__":
    main()
