from __future__ import annotations

import numpy as np
import pytest

from faml_gpu.errors import InputError
from faml_gpu.masks import normalise, soft_sphere


@pytest.mark.parametrize("box", [20, 21])
def test_soft_sphere_profile_along_each_axis(box: int) -> None:
    """Radius 4, edge 4: full to 4, then ½(1 + cos(π k/4)) = .8536, .5, .1464, then nothing."""
    mask = soft_sphere(box, 4, 4)
    c = box // 2
    expected = [1, 1, 1, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]
    for line in (mask[c:, c, c], mask[c, c:, c], mask[c, c, c:], mask[c, c, c::-1]):
        np.testing.assert_allclose(line[:10], expected, atol=1e-6)
    # On the space diagonal |(3, 3, 3)| = 5.196.
    assert mask[c - 3, c + 3, c - 3] == pytest.approx(0.5 + 0.5 * np.cos(np.pi * 1.196152 / 4), abs=1e-6)
    assert mask.dtype == np.float32


def test_sharp_sphere_counts_the_lattice_points() -> None:
    """33 lattice points lie within 2 of the origin: 1 + 6 + 12 + 8 + 6."""
    assert soft_sphere(9, 2, 0).sum() == 33


@pytest.mark.parametrize(("radius", "edge", "match"), [(0, 2, "radius"), (-1, 2, "radius"), (3, -1, "edge")])
def test_soft_sphere_refuses(radius: float, edge: float, match: str) -> None:
    with pytest.raises(InputError, match=match):
        soft_sphere(8, radius, edge)


def test_normalise_uses_only_what_is_outside() -> None:
    rng = np.random.default_rng(0)
    boxes = (rng.standard_normal((3, 16, 16, 16)) * 7 + 1000).astype(np.float32)
    mask = soft_sphere(16, 4, 2)
    boxes[:, mask > 0] += 500  # the particle, edge of the mask included, has no say
    result = normalise(boxes, mask)
    outside = result[:, mask == 0].astype(np.float64)
    np.testing.assert_allclose(outside.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(outside.std(axis=1), 1, atol=1e-5)
    assert result.dtype == np.float32
    # Affine per box: 500 more inside is 500 over that box's standard deviation.
    inside = result[:, mask > 0].mean(axis=1)
    np.testing.assert_allclose(inside, 500 / 7, rtol=0.03)


def test_normalise_treats_each_box_alone() -> None:
    boxes = np.random.default_rng(1).standard_normal((2, 12, 12, 12)).astype(np.float32)
    mask = soft_sphere(12, 3, 1)
    scaled = boxes * np.array([1, 50], np.float32)[:, None, None, None] + np.float32(3)
    np.testing.assert_allclose(normalise(scaled, mask), normalise(boxes, mask), atol=2e-5)


def test_normalise_refuses_a_mask_without_outside() -> None:
    with pytest.raises(InputError, match="outside"):
        normalise(np.ones((1, 8, 8, 8), np.float32), soft_sphere(8, 20, 0))


def test_normalise_refuses_a_constant_background() -> None:
    boxes = np.random.default_rng(2).standard_normal((3, 12, 12, 12)).astype(np.float32)
    mask = soft_sphere(12, 3, 1)
    boxes[1][mask == 0] = 4.0
    with pytest.raises(InputError, match=r"1 of 3 boxes .* number 1 "):
        normalise(boxes, mask)
