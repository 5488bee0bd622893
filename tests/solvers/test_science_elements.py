"""Elements as arrays against integrals in closed form and the divergence theorem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.science.elements import Elements, build, interval, rectangle, reference_box

F64 = torch.float64


def skew(degree: int) -> Elements:
    """A row of three parallelograms (0, 1.5) x (0, 1) sheared by 0.3 y."""
    origins = np.array([[0.5 * i, 0.0] for i in range(3)])
    return build(reference_box(degree, 2), origins, np.array([[[0.5, 0.3], [0.0, 1.0]]]))


GRIDS = {
    "line": lambda k: interval(-1.0, 2.0, 5, k),
    "square": lambda k: rectangle((0.0, -1.0), (1.5, 1.0), (3, 4), k),
    "skew": skew,
}


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("name", GRIDS)
def test_polynomials_of_the_degree_are_kept_and_integrated(name: str, degree: int) -> None:
    e = GRIDS[name](degree)

    def f(x: Tensor) -> list[Tensor]:
        return [(0.3 + x[..., 0] - 0.5 * x[..., -1]) ** degree, 1 + 0 * x[..., 0]]

    u = e.project(f)
    assert float(e.distance(u, f).max()) < 1e-13
    area = {"line": 3.0, "square": 3.0, "skew": 1.5}[name]
    assert float(e.integral(u)[1]) == pytest.approx(area, rel=1e-14)
    if name == "line":  # int of (0.3 + x/2)^k over (-1, 2)
        exact = 2 * (1.3 ** (degree + 1) - (-0.2) ** (degree + 1)) / (degree + 1)
        assert float(e.integral(u)[0]) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("name", GRIDS)
def test_volumes_and_faces_obey_the_divergence_theorem(name: str) -> None:
    """For f = (x, ...) of divergence dim: the weak form gives exactly u_t = -dim in every cell."""
    e = GRIDS[name](2)
    faces = torch.einsum("mn,knd->kmd", e.traces, e.project(lambda x: list(x.unbind(-1))))
    volume = sum(e.stiffness[:, d] @ e.points[..., d, None] for d in range(e.dim))
    out = volume - e.lift @ (faces * e.normals).sum(-1, keepdim=True)
    torch.testing.assert_close(out, torch.full_like(out, -e.dim), rtol=0, atol=1e-12)
    assert float((e.normals.norm(dim=-1) - 1).abs().max()) < 1e-14


def test_faces_are_matched_from_both_sides_and_around() -> None:
    for e, edges in (
        (interval(0, 1, 4, 1), 2),
        (interval(0, 1, 4, 1, True), 0),
        (rectangle((0, 0), (1, 1), (3, 4), 1), 2 * (2 * 3 + 2 * 4)),
        (rectangle((0, 0), (1, 1), (3, 4), 1, True), 0),
    ):
        assert int(e.boundary.sum()) == edges
        torch.testing.assert_close(e.exterior[e.exterior], torch.arange(len(e.exterior)))
        normals = e.normals.expand(e.count, -1, -1).reshape(-1, e.dim)
        inner = ~e.boundary.reshape(-1)
        assert float((normals + normals[e.exterior])[inner].abs().sum()) == 0
    assert interval(0, 1, 4, 1, True).neighbours.tolist() == [[3, 1], [0, 2], [1, 3], [2, 0]]


def test_the_linear_part_is_the_projection() -> None:
    e = interval(0, 1, 3, 3)
    cubic = e.project(lambda x: [x[..., 0] ** 3])
    points, weights = e.points, e.weights[..., None]
    rest = e.evaluate(cubic) - e.values @ (e.linear @ cubic)
    for moment in (torch.ones_like(points), points):
        assert float((rest * moment * weights).sum(1).abs().max()) < 1e-15
    constant = interval(0, 1, 3, 0)
    assert constant.linear.tolist() == [[1.0]]


def test_another_precision_and_bad_meshes() -> None:
    e = interval(0, 1, 3, 1).to(torch.float32)
    assert e.stiffness.dtype == torch.float32 and e.exterior.dtype == torch.int64
    assert e.project(lambda x: [x[..., 0]]).dtype == torch.float32
    twice = np.array([[0.0], [0.0], [1.0]])
    with pytest.raises(GliodeError, match="more than two cells"):
        build(reference_box(1, 1), twice, np.array([[[1.0]]]))
