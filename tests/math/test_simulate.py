from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.report import montage
from faml_gpu.simulate import PHANTOMS as NAMED
from faml_gpu.simulate import (
    Phantom,
    density,
    groel,
    ribosome,
    simulate_particles,
    tmv,
)

PHANTOMS = [groel(), ribosome()]
ALL = [make() for name, make in NAMED.items() if name != "tmv"]  # a tube leaves the box


def literal_density(phantom: Phantom, box: int, voxel: float, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The sum of Gaussians as written, at each voxel centre."""
    axis = (np.arange(box) - box // 2) * voxel
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    volume = np.zeros((box,) * 3)
    for p, s, w in zip(phantom.centres, phantom.widths, phantom.weights, strict=True):
        q = rotation @ p + voxel * shift
        r2 = (x - q[0]) ** 2 + (y - q[1]) ** 2 + (z - q[2]) ** 2
        volume += w * np.exp(-r2 / (2 * s**2)) / (2 * np.pi * s**2) ** 1.5
    return volume


@pytest.mark.parametrize("box", [24, 25])
def test_density_is_the_sum_of_its_blobs(box: int) -> None:
    rotation, shift = Rotation.random(random_state=3).as_matrix(), np.array([1.3, -0.4, 2.2])
    for phantom in PHANTOMS:
        found = density(phantom, box, 12.0, rotation, shift)
        expected = literal_density(phantom, box, 12.0, rotation, shift)
        assert found.dtype == np.float32
        # float32 sums of about 200 blobs
        np.testing.assert_allclose(found, expected, atol=2e-6 * expected.max())


def test_density_conserves_mass_also_when_blurred() -> None:
    for phantom in PHANTOMS:
        for resolution in (None, 30.0):
            mass = density(phantom, 64, 6.0, resolution=resolution).sum(dtype=np.float64) * 6.0**3
            assert mass == pytest.approx(phantom.weights.sum(), rel=1e-4)


def test_blur_has_the_transform_it_says() -> None:
    """Transform at 1 / resolution falls by 1/e: one blob, 40 A, along x at frequency 8 of 64 voxels of 5 A."""
    one = Phantom("blob", np.zeros((1, 3)), np.array([8.0]), np.array([1.0]), "C1", 20.0)
    sharp, blurred = (np.abs(np.fft.fftn(density(one, 64, 5.0, resolution=r)))[0, 0, 8] for r in (None, 40.0))
    assert blurred / sharp == pytest.approx(np.exp(-1), rel=1e-4)


@pytest.mark.parametrize("phantom", ALL, ids=lambda p: p.name)
def test_phantom_fits_its_radius_and_is_centred(phantom: Phantom) -> None:
    volume = density(phantom, 80, 5.0).astype(np.float64)
    axis = (np.arange(80) - 40) * 5.0
    r = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    assert volume[r <= phantom.radius].sum() / volume.sum() > 0.99
    np.testing.assert_allclose(np.average(phantom.centres, axis=0, weights=phantom.weights), 0, atol=1e-6)


def test_groel_is_a_barrel_of_the_size_of_groel() -> None:
    """About 135 A wide and 145 A tall with a cavity 45 A wide, at a tenth of the highest density."""
    volume = density(groel(), 96, 2.5, resolution=20.0)
    level = 0.1 * volume.max()
    axis = (np.arange(96) - 48) * 2.5
    filled = np.argwhere(volume > level)
    height = np.ptp(axis[filled[:, 0]])
    width = 2 * np.hypot(axis[filled[:, 1]], axis[filled[:, 2]]).max()
    assert 135 <= height <= 160
    assert 130 <= width <= 160
    assert volume[:, 48, 48].max() < 0.5 * level  # hollow from end to end


@pytest.mark.parametrize("phantom", ALL, ids=lambda p: p.name)
def test_symmetry_is_what_the_phantom_says_and_no_more(phantom: Phantom) -> None:
    volume = density(phantom, 48, 8.0)
    for rotation in phantom.rotations():
        np.testing.assert_allclose(density(phantom, 48, 8.0, rotation), volume, atol=1e-5 * volume.max())
    # Neither a mirror image nor, for the ribosome, any coarse turn is the structure again.
    mirrored = Phantom("m", phantom.centres * [1, 1, -1], phantom.widths, phantom.weights, "C1", phantom.radius)
    turns = Rotation.from_rotvec(np.deg2rad(5) * np.arange(72)[:, None] * [0, 0, 1]).as_matrix()
    others = [density(mirrored, 48, 8.0, turn, resolution=20.0) for turn in turns]
    blurred = density(phantom, 48, 8.0, resolution=20.0)
    assert max(np.corrcoef(blurred.ravel(), other.ravel())[0, 1] for other in others) < 0.97


@pytest.mark.parametrize(
    ("name", "symmetry", "width", "height", "mass"),
    [
        ("groel-es", "C7", 140, 184, 870),  # Xu et al., Nature 388 (1997) 741
        ("tric", "D8", 160, 160, 960),
        ("proteasome", "C1", None, 300, 1700),  # 20S with one 19S cap: 700 + 900 kDa, about 300 A long
    ],
)
def test_size_and_mass_of_the_phantoms(
    name: str, symmetry: str, width: float | None, height: float, mass: float
) -> None:
    phantom = NAMED[name]()
    assert phantom.symmetry == symmetry
    assert phantom.weights.sum() / 1e3 == pytest.approx(mass, rel=0.1)
    volume = density(phantom, 144, 2.5, resolution=15.0)
    z, y, x = (np.argwhere(volume > 0.1 * volume.max()).T - 72) * 2.5
    assert np.ptp(z) == pytest.approx(height, rel=0.1)
    if width is not None:
        assert 2 * np.hypot(x, y).max() == pytest.approx(width, rel=0.1)


def test_tmv_is_the_published_helix() -> None:
    """Turned by 3/49 of a turn and raised by 1.408 A it is itself; turned the other way, or not raised, it is not."""
    phantom = tmv(length=500.0)
    middle = np.s_[24:40]  # far from the ends
    volume = density(phantom, 64, 4.0, resolution=8.0)[middle]

    def moved(turn: float, rise: float) -> float:
        rotation = Rotation.from_euler("z", turn, degrees=True).as_matrix()
        return float(np.linalg.norm(density(phantom, 64, 4.0, rotation, (0, 0, rise / 4.0), 8.0)[middle] - volume))

    norm = np.linalg.norm(volume)
    assert moved(3 * 360 / 49, 1.408) < 1e-4 * norm
    assert moved(-3 * 360 / 49, 1.408) > 0.1 * norm
    assert moved(3 * 360 / 49, 0.0) > 0.05 * norm
    # 17 subunits are a turn and 6.1 mod 22 degrees: the seventeen-fold look of the tube.
    assert moved(360.0 / 17, 0.0) < moved(180.0 / 17, 0.0)
    axis = (np.arange(64) - 32) * 4.0
    profile = np.hypot(axis[:, None], axis)
    mass = density(phantom, 64, 4.0).sum(axis=0)
    assert mass[profile < 12].max() < 0.1 * mass.max()  # the channel
    assert mass[profile > 104].max() < 0.01 * mass.max()
    with pytest.raises(InputError, match="length"):
        tmv(length=0.0)


def test_every_orientation_of_the_ribosome_is_distinct_at_40_angstrom() -> None:
    phantom = ribosome()
    volume = density(phantom, 32, 12.0, resolution=40.0).ravel()
    turns = Rotation.random(300, random_state=0)
    turns = turns[turns.magnitude() > np.deg2rad(40)].as_matrix()
    scores = [np.corrcoef(volume, density(phantom, 32, 12.0, turn, resolution=40.0).ravel())[0, 1] for turn in turns]
    assert max(scores) < 0.93


def simulate(**changes: object) -> object:
    options = {"box": 32, "voxel_size": 12.0, "snr": 0.05, "seed": 4} | changes
    counts = options.pop("counts", [2, 3])
    return simulate_particles(PHANTOMS, counts, **options)


def test_simulation_holds_what_it_says() -> None:
    sim = simulate(snr=np.inf, tilt_range=(-90, 90))
    assert sim.boxes.shape == (5, 32, 32, 32)
    assert sim.boxes.dtype == np.float32
    assert sim.classes.tolist() == [0, 0, 1, 1, 1]
    assert sim.truth.shape == (2, 32, 32, 32)
    assert np.abs(sim.shifts).max() <= 3
    for k, phantom in enumerate(PHANTOMS):
        np.testing.assert_array_equal(sim.truth[k], density(phantom, 32, 12.0))
    # Without noise, and a wedge that leaves out at most the plane kx = 0, the box is the density in the true pose.
    spectra = np.fft.rfftn(sim.boxes, axes=(1, 2, 3))
    for i, k in enumerate(sim.classes):
        expected = np.fft.rfftn(density(PHANTOMS[k], 32, 12.0, sim.rotations[i], sim.shifts[i]))
        np.testing.assert_allclose(spectra[i][:, :, 1:], expected[:, :, 1:], atol=1e-5 * np.abs(expected).max())


def test_snr_is_variance_over_variance_before_the_wedge() -> None:
    clean, noisy = (simulate(snr=snr, tilt_range=(-60, 60)) for snr in (np.inf, 0.05))
    signal = density(PHANTOMS[1], 32, 12.0, noisy.rotations[4], noisy.shifts[4]).astype(np.float64)
    # What the wedge leaves of white noise: its variance times the share of observed coefficients.
    weight = noisy.weight
    copies = np.where(np.isin(np.arange(17), [0, 16]), 1, 2)
    observed = (weight * copies).sum() / 32**3
    variance = (noisy.boxes[4] - clean.boxes[4]).astype(np.float64).var()
    assert variance == pytest.approx(observed * signal.var() / 0.05, rel=0.03)
    # Nothing is left where the weight is 0, neither signal nor noise.
    spectrum = np.fft.rfftn(noisy.boxes[4])
    assert 0.2 < (weight == 0).mean() < 0.45
    assert np.abs(spectrum[weight == 0]).max() < 1e-5 * np.abs(spectrum).max()


def test_a_particle_does_not_depend_on_the_others() -> None:
    few, many = simulate(counts=[1, 2]), simulate(counts=[4, 2])
    np.testing.assert_array_equal(few.boxes[0], many.boxes[0])
    np.testing.assert_array_equal(few.boxes[1:], many.boxes[4:])
    np.testing.assert_array_equal(few.shifts[1:], many.shifts[4:])
    other = simulate(counts=[1, 2], seed=5)
    assert np.abs(few.rotations - other.rotations).max() > 0.1
    # Noise and poses differ from particle to particle.
    assert np.corrcoef(many.boxes[0].ravel(), many.boxes[1].ravel())[0, 1] < 0.5


def test_given_rotations_are_used() -> None:
    rotations = Rotation.random(5, random_state=0).as_matrix()
    np.testing.assert_array_equal(simulate(rotations=rotations).rotations, rotations)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"counts": [1]}, "counts"), ({"snr": 0.0}, "SNR"), ({"rotations": np.eye(3)[None]}, "rotations")],
)
def test_simulation_refuses(changes: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        simulate(**changes)


def test_montage_shows_the_slices(tmp_path: Path) -> None:
    """Each plane's first letter points right, its second up: one blob in each plane, off the other two."""
    size, c = 31, 15
    low, middle, high = slice(c - 11, c - 4), slice(c - 2, c + 3), slice(c + 5, c + 12)
    volume = np.zeros((size,) * 3, dtype=np.float32)
    volume[middle, high, low] = 1.0  # [z, y, x]: in xy, left and up
    volume[low, middle, high] = 1.0  # in xz, right and down
    volume[high, low, middle] = 1.0  # in yz, left and up
    path = montage({"a": 0 * volume, "b": volume}, tmp_path / "s.png", voxel_size=4.0, truth={"b": volume})
    assert [file.name for file in tmp_path.iterdir()] == ["s.png"]
    picture = imread(path)[..., 0]
    dpi, label_width, header, cell = 110, 1.9, 0.34, 1.9
    for block in (0, 1):
        for column, bright in enumerate([("up", "left"), ("down", "right"), ("up", "left")]):
            left = int(dpi * (label_width + cell * (3 * block + column) + 0.2 * block)) + 8
            top = int(dpi * (header + cell)) + 8
            side = int(dpi * cell) - 16
            panel, half = picture[top : top + side, left : left + side], side // 2
            for vertical, rows in (("up", slice(0, half)), ("down", slice(half, None))):
                for horizontal, columns in (("left", slice(0, half)), ("right", slice(half, None))):
                    if (vertical, horizontal) == bright:
                        assert panel[rows, columns].mean() > 0.15
                    elif (block, column, vertical) != (0, 0, "down"):  # where the scale bar is
                        assert panel[rows, columns].mean() < 0.02
    with pytest.raises(InputError, match="no maps"):
        montage({}, tmp_path / "t.png", voxel_size=4.0)
    with pytest.raises(InputError, match="cube"):
        montage({"flat": volume[0]}, tmp_path / "t.png", voxel_size=4.0)
    assert [file.name for file in tmp_path.iterdir()] == ["s.png"]
