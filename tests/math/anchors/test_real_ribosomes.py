"""The 40 real ribosomes at the poses found for them elsewhere: our reading of RELION's angles is the right one.

Reading, rotation and score are written here anew: nothing is shared with the code under test but the rule.
"""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from faml_gpu.geometry import relion_to_matrix

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "insitu70S"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="real data are not here: ../shared/data/insitu70S")


def read(path: Path) -> np.ndarray:
    with mrcfile.open(path) as mrc:
        return np.array(mrc.data, dtype=np.float64)


def star_rows() -> list[dict[str, str]]:
    """Rows of the last loop of reference_poses.star, by column name."""
    names: list[str] = []
    rows: list[dict[str, str]] = []
    for line in (DATA / "reference_poses.star").read_text().splitlines():
        words = line.split()
        if line.startswith(("loop_", "data_")):
            names, rows = [], []
        elif line.startswith("_"):
            names.append(words[0][1:])
        elif len(words) == len(names) > 0:
            rows.append(dict(zip(names, words, strict=True)))
    return rows


def turned(volume: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """X(x) = A(R^-1 x), asked voxel by voxel: the source of (x, y, z) is R^T (x, y, z)."""
    n = len(volume)
    z, y, x = np.indices(volume.shape) - n // 2
    source = np.einsum("ij,jzyx->izyx", matrix.T, np.stack([x, y, z]).astype(float)) + n // 2
    return ndimage.map_coordinates(volume, source[::-1], order=3)


def score(box: np.ndarray, weight: np.ndarray, model: np.ndarray) -> float:
    """Normalised cross-correlation over the observed Fourier voxels (weight centred), without the mean."""
    # The boxes are centred cubes of the same origin, which therefore cancels.
    observed = np.fft.ifftshift(weight) > 0
    observed[0, 0, 0] = False
    a, b = np.fft.fftn(box)[observed], np.fft.fftn(model)[observed]
    return float(np.sum(a * b.conj()).real / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.fixture(scope="module")
def means() -> dict[str, float]:
    reference = read(DATA / "reference_relion_reconstruction.mrc")
    n = len(reference)
    z, y, x = np.indices(reference.shape) - n // 2
    distance = np.sqrt(x**2 + y**2 + z**2)
    soft = 0.5 + 0.5 * np.cos(np.pi * np.clip((distance - 11) / 3, 0, 1))
    reference = (reference - reference[distance > 14].mean()) * soft
    # x -> -x about voxel N // 2; the plane at -N/2 has no partner and is 0 behind the mask.
    mirrored = np.roll(reference[:, :, ::-1], 1, axis=2)
    scores: dict[str, list[float]] = {"R": [], "R^T": [], "mirrored, R": [], "mirrored, R^T": []}
    for row in star_rows():
        box, weight = read(DATA / row["rlnImageName"]), read(DATA / row["rlnCtfImage"])
        assert [float(row[f"rlnOrigin{axis}Angst"]) for axis in "XYZ"] == [0, 0, 0]
        angles = [float(row[f"rlnAngle{name}"]) for name in ("Rot", "Tilt", "Psi")]
        matrix = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
        np.testing.assert_allclose(relion_to_matrix(angles), matrix, atol=1e-12)
        for name, model, r in [
            ("R", reference, matrix),
            ("R^T", reference, matrix.T),
            ("mirrored, R", mirrored, matrix),
            ("mirrored, R^T", mirrored, matrix.T),
        ]:
            scores[name].append(score(box, weight, turned(model, r)))
    assert len(scores["R"]) == 40
    return {name: float(np.mean(values)) for name, values in scores.items()}


@pytest.mark.parametrize("other", ["R^T", "mirrored, R", "mirrored, R^T"])
def test_boxes_agree_best_with_r(means: dict[str, float], other: str) -> None:
    # Another reading loses about a third; a tenth is far beyond the standard error over 40 boxes.
    assert means[other] < 0.9 * means["R"]
