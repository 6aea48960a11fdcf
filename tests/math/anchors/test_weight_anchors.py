"""Which voxels a tilted projection fills, from the physics of projection; no shared geometry code.

A density is projected along the beam (Z) after a positive tilt about Y, x' = x cos + z sin. By the projection theorem
its 2-D transform is a slice of the 3-D transform; here both sides are computed apart, as closed forms and with an FFT.
"""

import math

import numpy as np
import pytest

from faml_gpu.weights import centred_from_half, missing_wedge

BOX = 32
HALF = BOX // 2
# (x, y, z) from the box centre, height, standard deviation: nothing here has a mirror or a rotation axis.
BLOBS = [((5.0, -2.0, 3.0), 1.0, 1.6), ((-3.0, 4.0, 1.0), 0.7, 2.0), ((1.0, 2.0, -6.0), 1.4, 1.3)]


def volume_transform(kx, ky, kz):
    """Continuous Fourier transform of the blobs at frequencies in cycles per box."""
    total = 0
    for (x, y, z), height, width in BLOBS:
        envelope = np.exp(-2 * (np.pi * width / BOX) ** 2 * (kx**2 + ky**2 + kz**2))
        phase = np.exp(-2j * np.pi * (kx * x + ky * y + kz * z) / BOX)
        total = total + height * (2 * np.pi * width**2) ** 1.5 * envelope * phase
    return total


def projection(tilt):
    """Analytic line integral along the beam of the tilted blobs, [y, x'] with the centre at N//2."""
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    y, x = np.mgrid[:BOX, :BOX] - HALF
    image = np.zeros((BOX, BOX))
    for (px, py, pz), height, width in BLOBS:
        distance = (x - (px * cos + pz * sin)) ** 2 + (y - py) ** 2
        image += height * math.sqrt(2 * math.pi) * width * np.exp(-distance / (2 * width**2))
    return image


def sampled_volume():
    """The blobs as an array [z, y, x], centre at voxel N//2."""
    z, y, x = np.mgrid[:BOX, :BOX, :BOX] - HALF
    return sum(
        height * np.exp(-((x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2) / (2 * width**2))
        for (px, py, pz), height, width in BLOBS
    )


def test_closed_form_is_the_transform_of_the_array():
    k = np.fft.fftfreq(BOX) * BOX
    spectrum = np.fft.fftn(np.fft.ifftshift(sampled_volume()))
    expected = volume_transform(k[None, None, :], k[None, :, None], k[:, None, None])
    error = np.linalg.norm(spectrum - expected) / np.linalg.norm(expected)
    assert error < 2e-2  # aliasing and the box's edge; an axis mixed up gives more than 1


def test_projection_at_plus_50_is_the_slice_and_not_its_mirror():
    cos, sin = math.cos(math.radians(50)), math.sin(math.radians(50))
    image = np.fft.fft2(np.fft.ifftshift(projection(50)))
    k = np.fft.fftfreq(BOX) * BOX
    # Along the projection's u axis: (kx, kz) = u (cos, sin), that is kz = tan(50) kx.
    slice_ = volume_transform(k[None, :] * cos, k[:, None], k[None, :] * sin)
    mirror = volume_transform(k[None, :] * cos, k[:, None], -k[None, :] * sin)
    size = np.linalg.norm(image)
    assert np.linalg.norm(image - slice_) / size < 1e-3
    assert np.linalg.norm(image - mirror) / size > 0.5


def on_slice(tilt):
    """Index [kz, kx] in a centred cube of the voxels nearest to the slice of a tilt, up to |u| = N/2 - 2."""
    u = np.concatenate([np.arange(-HALF + 2, -1.5, 0.5), np.arange(2, HALF - 1.5, 0.5)])
    angle = math.radians(tilt)
    return np.rint(u * math.sin(angle)).astype(int) + HALF, np.rint(u * math.cos(angle)).astype(int) + HALF


@pytest.mark.parametrize("tilt", range(-47, 68, 3))
def test_weight_holds_its_tilts(tilt):
    # Within 3 degrees of the edge the voxel nearest to the slice may lie beyond it: see the next test.
    cube = centred_from_half(missing_wedge(BOX, (-50, 70)), BOX)
    kz, kx = on_slice(tilt)
    angle = np.degrees(np.arctan2((kz - HALF) * np.sign(kx - HALF), np.abs(kx - HALF)))
    inside = (angle > -50) & (angle < 70) & (kx != HALF)
    assert inside.mean() > 0.8
    assert (cube[kz[inside], :, kx[inside]] == 1).all()


@pytest.mark.parametrize("tilt", range(-50, 71, 5))
def test_weight_holds_the_power_of_its_projections(tilt):
    """The slice is 1.6 voxels thick, 15 degrees at 6 voxels: at -50 and +70 more than half lies beyond the edge."""
    inside, total = power_in_weight(tilt)
    assert inside > (0.98 if -35 <= tilt <= 55 else 0.2) * total


@pytest.mark.parametrize("tilt", [-60, -65])
def test_weight_does_not_hold_the_mirrored_projections(tilt):
    inside, total = power_in_weight(tilt)
    assert inside < 0.05 * total


def power_in_weight(tilt):
    """Power of one back-projected image (its slice, one voxel thick) in the voxels of a -50 .. +70 weight, and of all.

    The image is smeared along the tilted beam in real space: voxel (x, z) gets the image at x cos + z sin.
    """
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    z, y, x = np.mgrid[:BOX, :BOX, :BOX] - HALF
    smeared = np.zeros((BOX, BOX, BOX))
    for (px, py, pz), height, width in BLOBS:
        distance = (x * cos + z * sin - (px * cos + pz * sin)) ** 2 + (y - py) ** 2
        smeared += height * np.exp(-distance / (2 * width**2))
    # A soft sphere, so that the box's edge adds no streaks.
    # It makes the slice 32 / (2 pi 6.4) = 0.8 voxels (sigma) thick.
    smeared *= np.exp(-(x**2 + y**2 + z**2) / (2 * (BOX / 5) ** 2))
    power = np.abs(np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(smeared)))) ** 2
    # Low frequencies lie within a voxel or two of every slice and tell no tilt from another.
    far = np.hypot(x, z) >= 6
    weight = centred_from_half(missing_wedge(BOX, (-50, 70)), BOX)
    return float((power * weight)[far].sum()), float(power[far].sum())
