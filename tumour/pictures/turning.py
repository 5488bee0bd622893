"""turn.html: the glass brain with its tumours in a page that turns in a browser, without a network."""

from __future__ import annotations

import base64
import html
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyvista
from matplotlib.colors import to_rgb

from tumour.pictures import glass, style
from tumour.pictures.page import PAGE
from tumour.pictures.rendering import View
from tumour.pictures.results import Array, Outline
from tumour.pictures.surfaces import Surfaces

TRIANGLES = 150_000
"""Larger surfaces are decimated to this many, which keeps the page at a few MB."""


def draw(surfaces: Surfaces, path: Path) -> Path:
    """Write the page. Errors: Inapplicable where there is no surface to show."""
    results = surfaces.results
    day = results.day
    glass.require_surface(results, day)
    layers = _layers(surfaces, results.outlines(day))
    points = np.concatenate([np.asarray(surface.points, dtype=np.float64) for surface, _ in layers])
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    towards = glass.direction(results)
    towards /= np.linalg.norm(towards)
    view = View.fit(points, towards, (1000, 1000), (0.07, 0.07, 0.93, 0.93))
    scene = {
        "low": low.tolist(),
        "span": span.tolist(),
        "centre": (low + span / 2).tolist(),
        "sulcus": (glass.SULCUS / 255).tolist(),
        "view": {
            "azimuth": float(np.arctan2(towards[1], towards[0])),
            "elevation": float(np.arcsin(towards[2])),
            "height": view.height,
        },
        "layers": [
            look | {"points": surface.n_points, "indices": 3 * surface.n_cells} for surface, look in layers
        ],
    }
    packed = zlib.compress(b"".join(_pack(surface, low, span) for surface, _ in layers), 9)
    text = {
        "@TITLE@": html.escape(str(results.report.get("case", results.path.name))),
        "@DAY@": style.day_name(day),
        "@SCENE@": json.dumps(scene).replace("</", "<\\/"),
        "@DATA@": base64.b64encode(packed).decode("ascii"),
    }
    page = PAGE
    for mark, value in text.items():
        page = page.replace(mark, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _layers(surfaces: Surfaces, outlines: list[Outline]) -> list[tuple[pyvista.PolyData, dict[str, Any]]]:
    """Surfaces with what the page needs to know: name, colour, opacity, is it glass, height of its swatch."""
    brain: dict[str, Any] = {
        "name": "Brain",
        "colour": (glass.GYRUS / 255).tolist(),
        "opacity": 1.0,
        "glass": True,
        "swatch": 12,
    }
    found = [(_light(surfaces.shell), brain)]
    for item in sorted(glass.tumours(surfaces, outlines), key=lambda item: item.width is not None):
        look: dict[str, Any] = {
            "name": item.text,
            "colour": to_rgb(style.COLOURS[item.outline.label]),
            "opacity": item.opacity,
        }
        look |= {"glass": False, "swatch": 12 if item.width is None else 1.5 * item.width}
        found.append((_light(item.surface), look))
    return found


def _light(surface: pyvista.PolyData) -> pyvista.PolyData:
    """Triangles only, at most TRIANGLES of them."""
    surface = surface.triangulate()
    if surface.n_cells > TRIANGLES:
        surface = surface.decimate_pro(1.0 - TRIANGLES / surface.n_cells, preserve_topology=True)
        surface = surface.compute_normals(cell_normals=False, split_vertices=False)
    return surface


def _pack(surface: pyvista.PolyData, low: Array, span: Array) -> bytes:
    """Positions as shares of the box, normals with `cortex`, steps of the indices, little-endian integers."""
    places = np.rint((np.asarray(surface.points, dtype=np.float64) - low) / span * 65535).astype("<u2")
    cortex = surface.point_data["cortex"] if "cortex" in surface.point_data else np.zeros(surface.n_points)
    shape = np.column_stack([surface.point_data["Normals"], cortex])
    indices = surface.faces.reshape(-1, 4)[:, 1:].ravel().astype(np.int64)
    steps = np.diff(indices, prepend=0).astype("<i4")
    return places.tobytes() + np.rint(shape * 32767).astype("<i2").tobytes() + steps.tobytes()
