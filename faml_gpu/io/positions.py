"""Where particles are in their tomograms, once they have been found off the centres of their boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faml_gpu.errors import InputError
from faml_gpu.geometry import relion_to_matrix
from faml_gpu.io.star import StarTable

__all__ = ["assumed_pixel_size", "box_frames", "recentered"]

CENTRED = tuple(f"rlnCenteredCoordinate{x}Angst" for x in "XYZ")  # RELION 5: Angstrom from the tomogram's centre
CORNER = tuple(f"rlnCoordinate{x}" for x in "XYZ")  # before: pixels from its corner
FRAME = tuple(f"rlnTomoSubtomogram{angle}" for angle in ("Rot", "Tilt", "Psi"))
# Of the images that corner coordinates count in, the first that optics groups or particles have.
PIXELS = ("rlnTomoTiltSeriesPixelSize", "rlnMicrographOriginalPixelSize", "rlnMicrographPixelSize")
UNSET = 999.0  # a prior that RELION takes for none


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
    tomogram's own where there are none) and the origin in the box's frame, which is minus the shift. Priors of origins
    stay where they are in the tomogram: less the origin.

    Parameters
    ----------
    table : of the input
    shifts : (n, 3), of the particles in their boxes, Angstrom, (x, y, z)

    Returns
    -------
    rlnCenteredCoordinateXAngst ... (RELION 5) and rlnCoordinateX ... (before), whichever the table has;
    rlnOrigin*Angst, and rlnOrigin*PriorAngst where it has priors

    Raises
    ------
    InputError
        No such coordinates; those in pixels, and nothing tells of which size (see `assumed_pixel_size`).
    """
    found = np.asarray(shifts, dtype=np.float64)
    moved = np.einsum("nij,nj->ni", box_frames(table), found)
    columns: dict[str, NDArray[np.float64]] = {}
    for names, in_pixels in ((CENTRED, False), (CORNER, True)):
        if not set(names) <= set(table.columns):
            continue
        size = _pixel_sizes(table) if in_pixels else np.ones(table.n_rows)
        for axis, name in enumerate(names):
            columns[name] = table.floats(name) + moved[:, axis] / size
    if not columns:
        raise InputError(
            f"option recenter: {table.path} has no coordinates, expected {CENTRED[0]} (Y, Z) or {CORNER[0]} (Y, Z)"
        )
    for axis, letter in enumerate("XYZ"):
        columns[f"rlnOrigin{letter}Angst"] = np.zeros(table.n_rows)
        columns |= _priors(table, f"rlnOrigin{letter}Prior", found[:, axis])
    return columns


def assumed_pixel_size(table: StarTable) -> float | None:
    """Angstrom, where `recentered` can only assume that coordinates count in the pixels of the boxes, else None.

    RELION 3.0 has no column for it. Boxes that were binned when they were cut have coordinates in smaller pixels.
    """
    in_pixels = set(CORNER) <= set(table.columns)
    return table.voxel_size if in_pixels and table.optics is None and _stated_pixel_sizes(table) is None else None


def _priors(table: StarTable, name: str, shift: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Priors along an axis, in Angstrom, seen from where the particle was found; `shift` in Angstrom."""
    angstrom = f"{name}Angst"
    if angstrom in table.columns:
        before, size = table.floats(angstrom), 1.0
    elif name in table.columns and table.voxel_size is not None:
        before, size = table.floats(name), table.voxel_size
    else:
        return {}
    return {angstrom: np.where(abs(before - UNSET) < 0.01, UNSET, before * size + shift)}


def _stated_pixel_sizes(table: StarTable) -> NDArray[np.float64] | None:
    """Angstrom, of the images that each particle's coordinates count in."""
    for name in PIXELS:
        sizes = table.numbers(name)
        if sizes is not None:
            for row in np.flatnonzero(sizes <= 0)[:1]:
                raise InputError(
                    f"{table.path}: {name} is {sizes[row]:g} in {table.place(int(row), name)}, expected more than 0 A"
                )
            return sizes
    return None


def _pixel_sizes(table: StarTable) -> NDArray[np.float64]:
    """The same, or what is assumed."""
    sizes, assumed = _stated_pixel_sizes(table), assumed_pixel_size(table)
    if sizes is None and assumed is not None:
        sizes = np.full(table.n_rows, assumed)
    if sizes is None:
        raise InputError(
            f"option recenter: {table.path} does not say the pixel size that {CORNER[0]} counts in, expected "
            f"{PIXELS[0]} in data_optics, or a column {PIXELS[2]}"
        )
    return sizes
