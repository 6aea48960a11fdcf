"""Where particles are in their tomograms, once they have been found off the centres of their boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faml_gpu.errors import InputError
from faml_gpu.geometry import relion_to_matrix
from faml_gpu.io.star import StarTable

__all__ = ["box_frames", "recentered"]

CENTRED = tuple(f"rlnCenteredCoordinate{x}Angst" for x in "XYZ")  # RELION 5: Angstrom from the tomogram's centre
CORNER = tuple(f"rlnCoordinate{x}" for x in "XYZ")  # before: pixels from its corner
FRAME = tuple(f"rlnTomoSubtomogram{angle}" for angle in ("Rot", "Tilt", "Psi"))
# Of the images that corner coordinates count in, the first that the optics groups have.
PIXELS = ("rlnTomoTiltSeriesPixelSize", "rlnMicrographOriginalPixelSize", "rlnMicrographPixelSize")
ORIGINS = tuple(f"rlnOrigin{x}Angst" for x in "XYZ")


def box_frames(table: StarTable) -> NDArray[np.float64]:
    """A_sub, which takes vectors in the frame a box was cut in to the tomogram's: (n, 3, 3) float64, (x, y, z).

    That of rlnTomoSubtomogramRot/Tilt/Psi (RELION 4 and 5), 0 where a column is missing: the identity where the boxes
    lie as their tomogram does. RELION has the pose of a particle in its tomogram as A_sub R.

    Raises
    ------
    InputError
        A value is no number.
    """
    angles = [table.floats(name) if name in table.columns else np.zeros(table.n_rows) for name in FRAME]
    return relion_to_matrix(np.stack(angles, axis=-1))


def recentered(table: StarTable, shifts: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Columns that put each particle in the centre of its box when boxes are extracted anew, its origin 0.

    Position = coordinate - A_sub origin, with A_sub the frame the box was cut in (rlnTomoSubtomogramRot/Tilt/Psi; the
    tomogram's own where there are none) and the origin in the box's frame, which is minus the shift.

    Parameters
    ----------
    table : of the input
    shifts : (n, 3), of the particles in their boxes, Angstrom, (x, y, z)

    Returns
    -------
    rlnCenteredCoordinateXAngst ... (RELION 5) and rlnCoordinateX ... (before), whichever the table has, and rlnOrigin*

    Raises
    ------
    InputError
        No such coordinates; those in pixels, and no optics group tells of which size.
    """
    found = np.asarray(shifts, dtype=np.float64)
    moved = np.einsum("nij,nj->ni", box_frames(table), found)
    columns: dict[str, NDArray[np.float64]] = {}
    for names, unit in ((CENTRED, None), (CORNER, PIXELS)):
        if not set(names) <= set(table.columns):
            continue
        size = np.ones(table.n_rows) if unit is None else _pixel_sizes(table, unit)
        for axis, name in enumerate(names):
            columns[name] = table.floats(name) + moved[:, axis] / size
    if not columns:
        raise InputError(
            f"option recenter: {table.path} has no coordinates, expected {CENTRED[0]} (Y, Z) or {CORNER[0]} (Y, Z)"
        )
    return columns | {name: np.zeros(table.n_rows) for name in ORIGINS}


def _pixel_sizes(table: StarTable, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Angstrom, of each particle's optics group."""
    for name in names:
        sizes = {group: _as_size(table, name, text) for group, text in table.optics_values(name).items()}
        if sizes:
            return np.array([sizes[group] for group in table.strings("rlnOpticsGroup")])
    raise InputError(
        f"option recenter: {table.path} does not say the pixel size that {CORNER[0]} counts in, expected "
        f"{names[0]} in data_optics"
    )


def _as_size(table: StarTable, name: str, text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not (np.isfinite(size) and size > 0):
        raise InputError(f"{table.path}: {name} is {text:.60} in data_optics, expected more than 0 A")
    return size
