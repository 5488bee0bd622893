"""Off-screen rendering with pyvista: cameras that fit, light, and drawing layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyvista

from tumour.pictures.style import MIST, PAPER

Array = np.ndarray
EYE = 600.0
"""Distance of the camera from the scene's middle, mm (a parallel projection does not show it)."""


@dataclass(frozen=True)
class View:
    """A parallel projection.

    `towards`: unit vector from the scene to the eye; `centre`: the picture's middle, RAS mm; `height`: from
    the picture's lower to its upper edge, mm; `size`: pixels (width, height).
    """

    towards: Array
    centre: Array
    height: float
    size: tuple[int, int]

    @property
    def axes(self) -> Array:
        """Unit vectors of the picture's right and up, (2, 3)."""
        right = np.cross([0.0, 0.0, 1.0], self.towards)
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(self.towards, right)])

    @classmethod
    def fit(
        cls, points: Array, towards: Array, size: tuple[int, int], box: tuple[float, float, float, float]
    ) -> View:
        """The view in which the points fill the box (left, bottom, right, top in shares of the picture)."""
        towards = np.asarray(towards, dtype=float) / np.linalg.norm(towards)
        view = cls(towards, np.zeros(3), 1.0, size)
        flat = points @ view.axes.T
        low, high = flat.min(axis=0), flat.max(axis=0)
        aspect = size[0] / size[1]
        wide, tall = (box[2] - box[0]) * aspect, box[3] - box[1]
        height = float(max((high[0] - low[0]) / wide, (high[1] - low[1]) / tall))
        middle = (low + high) / 2
        middle[0] -= ((box[0] + box[2]) / 2 - 0.5) * height * aspect
        middle[1] -= ((box[1] + box[3]) / 2 - 0.5) * height
        depth = float((points @ towards).mean())
        return replace(view, centre=middle @ view.axes + depth * towards, height=height)

    def shares(self, millimetres: float) -> float:
        """A length in mm as a share of the picture's width."""
        return millimetres / (self.height * self.size[0] / self.size[1])

    def pixels(self, points: Array) -> Array:
        """Column and row, fractional, of RAS points: (n, 3) -> (n, 2)."""
        right, up = ((points - self.centre) @ self.axes.T / self.height * self.size[1]).T
        return np.column_stack([(self.size[0] - 1) / 2 + right, (self.size[1] - 1) / 2 - up])


@dataclass(frozen=True)
class Layer:
    """A surface and its look: one colour, or point data `scalars` (RGBA, or values with cmap and clim)."""

    surface: pyvista.PolyData
    colour: str | None = None
    scalars: str | None = None
    opacity: float = 1.0
    outside_only: bool = False
    cmap: Any = None
    clim: tuple[float, float] | None = None


def add(plotter: Any, layer: Layer) -> None:
    """Put a layer into a plotter; an empty surface is left out."""
    if layer.surface.n_points == 0:
        return
    look: dict[str, Any] = {
        "smooth_shading": True,
        "ambient": 0.4,
        "diffuse": 0.7,
        "specular": 0.3,
        "specular_power": 22,
    }
    if layer.scalars is None:
        look |= {"color": layer.colour}
    elif layer.cmap is None:
        look |= {"scalars": layer.scalars, "rgba": True}
    else:
        look |= {"scalars": layer.scalars, "cmap": layer.cmap, "clim": layer.clim, "show_scalar_bar": False}
        look |= {"ambient": 0.55, "diffuse": 0.5, "specular": 0.05}
    culling = "back" if layer.outside_only else None
    plotter.add_mesh(layer.surface, opacity=layer.opacity, culling=culling, **look)


def light(plotter: Any, view: View) -> None:
    """Three lamps that follow the camera: key from upper left, fill from the right, rim from behind."""
    right, up = view.axes
    for direction, strength in (
        (-0.55 * right + 0.75 * up + 0.65 * view.towards, 0.72),
        (0.9 * right + 0.1 * up + 0.6 * view.towards, 0.3),
        (0.2 * right + 0.8 * up - 0.6 * view.towards, 0.22),
    ):
        place = view.centre + 1000.0 * direction
        plotter.add_light(
            pyvista.Light(position=tuple(place), focal_point=tuple(view.centre), intensity=strength)
        )


def render(layers: Sequence[Layer], view: View, plain: bool = False) -> Array:
    """The layers as an image, uint8 (height, width, 3), on a light gradient or, if `plain`, on white."""
    plotter: Any = pyvista.Plotter(off_screen=True, window_size=list(view.size), lighting="none")
    try:
        if plain:
            plotter.set_background(PAPER)
        else:
            plotter.set_background(MIST, top=PAPER)
        light(plotter, view)
        for layer in layers:
            add(plotter, layer)
        plotter.enable_parallel_projection()
        plotter.enable_depth_peeling(8)
        plotter.enable_anti_aliasing("ssaa")
        point(plotter, view)
        return np.ascontiguousarray(plotter.screenshot(None, return_img=True)[..., :3])
    finally:
        plotter.close()


def front(surface: pyvista.PolyData, view: View) -> Array:
    """Depth buffer: largest coordinate along `view.towards` by pixel, mm, (height, width); empty: -inf."""
    plotter: Any = pyvista.Plotter(off_screen=True, window_size=list(view.size), lighting="none")
    try:
        plotter.add_mesh(surface, color="white")
        plotter.enable_parallel_projection()
        point(plotter, view)
        plotter.show(auto_close=False)
        depth = plotter.get_image_depth(fill_value=-np.inf, reset_camera_clipping_range=False)
    finally:
        plotter.close()
    return np.asarray(depth, dtype=np.float64) + EYE + float(view.centre @ view.towards)


def point(plotter: Any, view: View) -> None:
    """Aim the plotter's camera."""
    plotter.camera_position = [tuple(view.centre + EYE * view.towards), tuple(view.centre), (0.0, 0.0, 1.0)]
    plotter.camera.parallel_scale = view.height / 2
    plotter.camera.clipping_range = (EYE - 400.0, EYE + 400.0)
