"""Triangle surfaces of maps, by flying edges (marching cubes) in voxel space and the affine to RAS mm."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyvista
from scipy import ndimage

from tumour.pictures.results import Array, Map, Outline, ResultFolder

SPACING = 1.6
"""Surfaces are drawn from a grid of about this spacing, mm."""


def isosurface(field: Map, level: float, smoothing: int = 0) -> pyvista.PolyData:
    """The closed surface field = level, in RAS mm, normals outwards; empty where the field stays below.

    Zeros are padded around the grid, so the surface is closed also where the field reaches the grid's edge.
    `smoothing` is the number of Taubin steps (which, unlike Laplace's, keep the volume).
    """
    image = pyvista.ImageData(dimensions=np.array(field.values.shape) + 2)
    image["value"] = np.pad(field.values, 1).ravel(order="F")
    surface = image.contour([level], scalars="value", method="flying_edges", compute_normals=False)
    if surface.n_points == 0:
        return pyvista.PolyData()
    surface.clear_data()
    surface = surface.clean(lines_to_points=False, polys_to_lines=False)  # no triangles without area
    surface.points = field.points(np.asarray(surface.points, dtype=np.float64) - 1.0)
    if smoothing:
        surface = surface.smooth_taubin(n_iter=smoothing, pass_band=0.06)
    return outward(surface)


def outward(surface: pyvista.PolyData) -> pyvista.PolyData:
    """The same surface with point normals that point out, whatever the handedness of the affine."""
    return surface.compute_normals(auto_orient_normals=True, consistent_normals=True, split_vertices=False)


def around(field: Map, level: float) -> Map:
    """The part of a map where it exceeds the level, and the voxels next to it."""
    inside = np.argwhere(field.values > level)
    if len(inside) == 0:
        return field
    low, high = np.maximum(inside.min(axis=0) - 1, 0), inside.max(axis=0) + 2
    affine = field.affine.copy()
    affine[:3, 3] = field.points(low)
    return Map(field.values[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], affine)


def regrid(field: Map) -> Map:
    """The map on a grid of about SPACING: a whole number of times finer (linear) or coarser (block means).

    Zeros are added around, as many as the surfaces' smoothing reaches.
    """
    pad = 4
    padded = np.pad(field.values, pad)
    finer, coarser = max(1, round(field.spacing / SPACING)), max(1, round(SPACING / field.spacing))
    if finer > 1:
        values = ndimage.zoom(padded, finer, order=1, mode="nearest", grid_mode=True)
    else:
        padded = np.pad(padded, [(0, -size % coarser) for size in padded.shape])
        blocks = [part for size in padded.shape for part in (size // coarser, coarser)]
        values = padded.reshape(blocks).mean(axis=(1, 3, 5))
    scale = coarser / finer
    affine = field.affine.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] = field.points(np.full(3, (scale - 1) / 2 - pad))
    return Map(values, affine)


class Surfaces:
    """The surfaces that the pictures of one result share, each made once."""

    def __init__(self, results: ResultFolder) -> None:
        self.results = results
        self._outlines: dict[Outline, pyvista.PolyData] = {}

    @cached_property
    def shell(self) -> pyvista.PolyData:
        """The brain's outer surface with point data `cortex`: 0 in the depth of a sulcus, 1 on a gyrus.

        The tissue fraction (grey + white, inside the brain's mask) is closed over 3.5 mm, which bridges
        fissures and ventricles, so that the glass shows its outside only; `cortex` mixes how concave the
        surface is with how much grey and white matter lies just beneath it.
        """
        tissue, white = self._tissue()
        fine = regrid(tissue)
        reach = max(1, round(3.5 / fine.spacing))
        offsets = np.indices((2 * reach + 1,) * 3) - reach
        closed = ndimage.grey_closing(fine.values, footprint=(offsets**2).sum(axis=0) <= reach**2)
        closed = np.maximum(closed, ndimage.binary_fill_holes(closed > 0.5))
        closed = ndimage.gaussian_filter(closed, 1.2 / fine.spacing)
        surface = isosurface(Map(closed, fine.affine), 0.5, smoothing=20).connectivity("largest")
        surface = outward(surface)
        points = np.asarray(surface.points, dtype=np.float64)
        inwards = -np.asarray(surface.point_data["Normals"], dtype=np.float64)
        hull = Map(ndimage.gaussian_filter(closed, 5.0 / fine.spacing), fine.affine).sample(points)
        beneath = np.mean([tissue.sample(points + depth * inwards) for depth in (1.0, 2.5, 4.0)], axis=0)
        bright = np.mean([white.sample(points + depth * inwards) for depth in (3.0, 5.0)], axis=0)
        shade = -1.0 * _standard(hull) + 0.5 * _standard(beneath) + 0.25 * _standard(bright)
        surface.clear_data()
        surface["cortex"] = np.clip(0.5 + 0.28 * shade, 0.0, 1.0)
        return outward(surface)

    def _tissue(self) -> tuple[Map, Map]:
        """Grey + white inside the brain's mask, and white; the mask alone where there are no tissue maps."""
        brain = self.results.map("brain")
        if not (self.results.has("grey") and self.results.has("white")):
            return brain, brain
        grey, white = self.results.map("grey"), self.results.map("white")
        near = ndimage.binary_dilation(brain.values > 0.5)
        return Map((grey.values + white.values) * near, brain.affine), white

    def of(self, outline: Outline) -> pyvista.PolyData:
        """The smoothed surface of an outline, empty where the map stays below its edge.

        A density drops to 0 where the brain ends; interpolated, it would move the surface by up to half
        a voxel. So it is continued from the nearest voxel inside, and cut off at the brain's own edge.
        """
        if outline not in self._outlines:
            field = around(self.results.map(outline.name), outline.edge)
            index = np.moveaxis(np.indices(field.values.shape), 0, -1)
            inside = self.results.map("brain").sample(field.points(index)) > 0.5
            nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
            density = regrid(Map(field.values[tuple(nearest)], field.affine))
            brain = regrid(Map(inside.astype(float), field.affine))
            both = np.minimum(density.values - outline.edge + 0.5, brain.values)
            self._outlines[outline] = isosurface(Map(both, density.affine), 0.5, smoothing=40)
        return self._outlines[outline]


def _standard(values: Array) -> Array:
    return (values - np.median(values)) / max(float(values.std()), 1e-12)


def rings(surface: pyvista.PolyData, step: float, radius: float) -> pyvista.PolyData:
    """Tubes where axial planes, `step` mm apart, cut the surface, so that others show through it."""
    low, high = surface.bounds[4:6]
    heights = np.arange(np.ceil(low / step) * step, high, step)
    cuts = [surface.slice(normal="z", origin=(0.0, 0.0, height)) for height in heights]
    cuts = [cut for cut in cuts if cut.n_points]
    if not cuts:
        return pyvista.PolyData()
    tubes = pyvista.merge(cuts).strip().tube(radius=radius, n_sides=8).triangulate()
    normals = np.array(tubes.active_normals)
    tubes.clear_data()
    tubes.point_data["Normals"] = normals  # by the name that VTK's other filters give them
    tubes.point_data.active_normals_name = "Normals"
    return tubes
