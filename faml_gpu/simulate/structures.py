"""Structures to simulate from: atoms of a PDB or mmCIF file, an MRC map, or a phantom, as a density in a box.

Whatever the origin, the density is brought to the voxel size in Fourier space (no aliasing), blurred to one
resolution and put on its centre of mass, so that structures of different origin can be compared. The low-pass filter is
the Gaussian of ChimeraX `molmap`, 1/e at 1 / resolution: an edge that is sharper would leave rings around atoms.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from faml_gpu.errors import InputError
from faml_gpu.fourier import full_band, inverse_transform
from faml_gpu.io.mrc import read_mrc
from faml_gpu.simulate.gridding import fourier_grid, sample
from faml_gpu.simulate.phantoms import PHANTOMS, density, tmv

__all__ = ["Structure", "load_structure", "principal_axis"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_ATOM_FILES = (".pdb", ".ent", ".cif", ".mmcif", ".pdb.gz", ".ent.gz", ".cif.gz", ".mmcif.gz")
_MAP_FILES = (".mrc", ".map", ".ccp4")
_CUT = 0.1  # of the highest value: what of a map counts as structure when its size and centre are taken
_ATOM_EDGE = 3.0  # Angstrom an atom reaches beyond its centre
_FINEST = 3.0  # Angstrom, voxels that atoms are put on at most


@dataclass(frozen=True)
class Structure:
    """A structure's density, ready for simulation.

    Attributes
    ----------
    name : short name, for labels
    source : what it was made from, in words
    density : (M, M, M) float32, `[z, y, x]`, centre of mass at voxel M // 2
        M is the box, or twice the box for a filament that leaves the box at both ends.
    voxel_size, resolution : Angstrom
    radius : Angstrom, of a sphere about the centre that holds the structure
    axis : (3,) unit vector (x, y, z), the principal axis
    """

    name: str
    source: str
    density: Float32
    voxel_size: float
    resolution: float
    radius: float
    axis: Float64


def load_structure(
    name: str | os.PathLike[str],
    *,
    box: int,
    voxel_size: float,
    resolution: float,
    assembly: str | None = None,
    room: float = 0.0,
) -> Structure:
    """Density of a structure by file or name.

    Parameters
    ----------
    name : a PDB or mmCIF file (also .gz), an MRC map, or the name of a phantom
    box : N, voxels
    voxel_size : Angstrom
    resolution : Angstrom, at which the Gaussian low-pass filter has fallen to 1/e
    assembly : biological assembly of a PDB or mmCIF file, by the name it has there; None is the first, or the file
        as it is where it describes none; "none" is the file as it is
    room : Angstrom the structure is to be shifted by at most

    Returns
    -------
    Structure

    Raises
    ------
    InputError
        No such file or phantom; a file that cannot be read; an assembly that is not there or has no atoms; an empty
        map; a structure larger than the box; a PDB or mmCIF file without the extra `simulate` (gemmi).
    """
    text = os.fspath(name)
    path = Path(text)
    lower = path.name.lower()
    if lower in PHANTOMS and not path.exists():
        return _from_phantom(lower, box, voxel_size, resolution, room)
    if not path.is_file():
        raise InputError(
            f"structure {text!r}: no such file, and no phantom of that name (phantoms: {', '.join(sorted(PHANTOMS))})"
        )
    if lower.endswith(_ATOM_FILES):
        return _from_atoms(path, box, voxel_size, resolution, assembly, room)
    if lower.endswith(_MAP_FILES):
        return _from_map(path, box, voxel_size, resolution, room)
    raise InputError(
        f"structure {text}: found a file that ends in none of {', '.join((*_ATOM_FILES, *_MAP_FILES))}, "
        "expected atoms (PDB, mmCIF) or a map (MRC)"
    )


def principal_axis(volume: Float32) -> Float64:
    """The axis of inertia that differs most from the other two: that of symmetry of a ring or barrel, the long one
    of a rod.

    Parameters
    ----------
    volume : (N, N, N) float32, density about voxel N // 2; negative values count as 0

    Returns
    -------
    (3,) float64 unit vector (x, y, z); the largest component is positive
    """
    mass = np.maximum(volume, 0.0).astype(np.float64)
    centre, moments = _moments(mass)
    values, vectors = np.linalg.eigh(moments / mass.sum() - np.outer(centre, centre))
    axis = vectors[:, 0 if values[1] - values[0] > values[2] - values[1] else 2]
    return np.asarray(axis * np.sign(axis[np.argmax(np.abs(axis))]))


def _moments(mass: Float64) -> tuple[Float64, Float64]:
    """Mean position (3,) and second moments (3, 3), not divided by the mass, about voxel N // 2, (x, y, z), voxels."""
    grids = [np.arange(n, dtype=np.float64) - n // 2 for n in mass.shape[::-1]]
    planes = {(0, 1): mass.sum(axis=0).T, (0, 2): mass.sum(axis=1).T, (1, 2): mass.sum(axis=2).T}
    lines = [mass.sum(axis=(0, 1)), mass.sum(axis=(0, 2)), mass.sum(axis=(1, 2))]
    centre = np.array([grids[a] @ lines[a] for a in range(3)]) / mass.sum()
    moments = np.diag([grids[a] ** 2 @ lines[a] for a in range(3)])
    for (a, b), plane in planes.items():
        moments[a, b] = moments[b, a] = grids[a] @ plane @ grids[b]
    return centre, moments


def _from_phantom(name: str, box: int, voxel_size: float, resolution: float, room: float) -> Structure:
    filament = name == "tmv"
    # A filament has to pass through the box in any pose.
    phantom = tmv(length=2 * box * voxel_size - 4 * voxel_size) if filament else PHANTOMS[name]()
    size = 2 * box if filament else box
    if not filament:
        _check_fits(name, phantom.radius, box, voxel_size, room)
    # Fine enough for the sharpest blob; the crop in Fourier space then takes away what the voxels cannot hold.
    fine = int(np.ceil(voxel_size / (phantom.widths.min() / 0.8)))
    volume = density(phantom, fine * size, voxel_size / fine)
    return _finish(name, f"phantom {name}", volume, voxel_size / fine, size, voxel_size, resolution, phantom.radius)


def _from_map(path: Path, box: int, voxel_size: float, resolution: float, room: float) -> Structure:
    volume, spacing = read_mrc(path)
    if spacing is None:
        raise InputError(f"{path}: no voxel size in the header, expected that of the map in A")
    if not np.isfinite(volume).all() or not volume.max() > 0:
        raise InputError(f"{path}: found no positive density in the map, expected a structure of high values")
    counted = np.where(volume >= _CUT * volume.max(), volume, 0.0).astype(np.float64)
    centre, _ = _moments(counted)
    z, y, x = np.nonzero(counted)
    offsets = np.stack([x, y, z], axis=1) - np.array(volume.shape[::-1]) // 2 - centre
    radius = float(np.sqrt((offsets**2).sum(axis=1).max()) * spacing)
    _check_fits(str(path), radius, box, voxel_size, room)
    source = f"map {path.name}, {' x '.join(map(str, volume.shape[::-1]))} voxels of {spacing:g} A"
    # A cube about the centre of mass, so that shifting by a fraction of a voxel is all that remains to be done.
    whole = np.rint(centre).astype(int)
    cube = _cube_about(volume, np.array(volume.shape) // 2 + whole[::-1])
    return _finish(path.name, source, cube, spacing, box, voxel_size, resolution, radius, shift=whole - centre)


def _cube_about(volume: Float32, centre: NDArray[np.int64]) -> Float32:
    """A cube that holds the volume, with voxel `centre` (z, y, x) at its voxel N // 2; 0 where there was nothing."""
    reach = max(int(max(c, n - 1 - c)) for c, n in zip(centre, volume.shape, strict=True))
    size = 2 * reach + 1
    cube = np.zeros((size,) * 3, np.float32)
    start = [reach - int(c) for c in centre]
    cube[tuple(slice(s, s + n) for s, n in zip(start, volume.shape, strict=True))] = volume
    return cube


def _from_atoms(
    path: Path, box: int, voxel_size: float, resolution: float, assembly: str | None, room: float
) -> Structure:
    model, what = _read_atoms(path, assembly)
    atoms = [site.atom for site in model.all()]
    positions = np.array([atom.pos.tolist() for atom in atoms])
    if not any(atom.occ > 0 for atom in atoms):  # some programs leave the column empty
        for atom in atoms:
            atom.occ = 1.0
    masses = np.array([atom.element.weight * atom.occ for atom in atoms])
    centre = np.average(positions, axis=0, weights=masses)
    radius = float(np.linalg.norm(positions - centre, axis=1).max()) + _ATOM_EDGE
    _check_fits(str(path), radius, box, voxel_size, room)
    volume, spacing = _electron_density(model, centre, 2 * (radius + resolution), min(_FINEST, resolution / 4), path)
    source = f"{path.name}, {what}, {len(atoms)} atoms"
    return _finish(path.name.split(".")[0], source, volume, spacing, box, voxel_size, resolution, radius)


def _gemmi(path: Path) -> Any:
    """The library for files of atoms, imported when there is one."""
    try:
        import gemmi
    except ImportError as error:
        raise InputError(
            f"structure {path}: PDB and mmCIF files are read by gemmi, which cannot be imported ({error}); get it with "
            "pip install 'faml-gpu[simulate]' ('.[simulate]' in a copy of the repository)"
        ) from None
    return gemmi


def _read_atoms(path: Path, assembly: str | None) -> tuple[Any, str]:
    """The atoms of a file's assembly without water, as a gemmi model, and which assembly it is in words."""
    gemmi = _gemmi(path)
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as PDB or mmCIF ({error})") from None
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise InputError(f"{path}: found no atoms, expected a PDB or mmCIF file of a structure")
    structure.setup_entities()
    model, what = structure[0], "as in the file"
    names = [found.name for found in structure.assemblies]
    if assembly is not None and assembly.lower() != "none" and assembly not in names:
        raise InputError(f"{path}: found no assembly {assembly!r}, it has {', '.join(names) or 'none'}")
    if names and (assembly is None or assembly.lower() != "none"):
        chosen = structure.assemblies[names.index(assembly) if assembly is not None else 0]
        try:
            model = gemmi.make_assembly(chosen, structure[0], gemmi.HowToNameCopiedChain.AddNumber)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: assembly {chosen.name} cannot be made ({error})") from None
        what = f"assembly {chosen.name}"
    model.remove_waters()
    if model.count_atom_sites() == 0:
        raise InputError(f"{path}: {what} is empty (no atoms but water), expected a structure")
    return model, what


def _electron_density(model: Any, centre: Float64, extent: float, spacing: float, path: Path) -> tuple[Float32, float]:
    """Electrostatic potential from electron scattering factors on a cube about `centre`, and its voxel size.

    The displacement factors of the file are put aside: they say how well a crystal was ordered. All atoms get one
    that suits the grid, and the filter that follows sets the resolution.
    """
    gemmi = _gemmi(path)
    size = 2 * int(np.ceil(extent / spacing / 2)) + 1
    edge = size * spacing
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(gemmi.UnitCell(edge, edge, edge, 90, 90, 90))
    calculator.grid.spacegroup = gemmi.SpaceGroup("P 1")
    calculator.grid.set_size(size, size, size)
    middle = (size // 2) * spacing
    # exp(-B s^2 / 4) at the grid's Nyquist frequency is exp(-4): what aliases is small, and is undone below.
    blur = 64.0 * spacing**2
    calculator.blur = 0.0
    for site in model.all():
        atom = site.atom
        if atom.element.c4322 is None:
            raise InputError(f"{path}: atom {atom.name}: no electron scattering factors for {atom.element.name!r}")
        atom.pos = gemmi.Position(*(np.array(atom.pos.tolist()) - centre + middle))
        atom.b_iso = blur
        atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)
    calculator.add_model_density_to_grid(model)
    # gemmi's grid is indexed [x, y, z].
    values = np.ascontiguousarray(np.array(calculator.grid, copy=False).transpose(2, 1, 0), dtype=np.float32)
    return _unblurred(values, blur, spacing), spacing


def _unblurred(volume: Float32, blur: float, spacing: float) -> Float32:
    """The volume without a displacement factor B = `blur`, up to the grid's Nyquist frequency."""
    n = len(volume)
    k = np.fft.fftfreq(n, spacing) ** 2
    square = k[:, None, None] + k[:, None] + np.fft.rfftfreq(n, spacing) ** 2
    gain = np.where(square <= 0.25 / spacing**2, np.exp(blur * square / 4), 0.0)
    return np.asarray(fft.irfftn(fft.rfftn(volume) * gain.astype(np.float32), s=volume.shape), dtype=np.float32)


def _check_fits(name: str, radius: float, box: int, voxel_size: float, room: float) -> None:
    half = (box // 2) * voxel_size
    if radius > half:
        raise InputError(
            f"structure {name}: reaches {radius:.0f} A from its centre, the box of {box} voxels of {voxel_size:g} A "
            f"only {half:.0f}; use a larger --box or --voxel-size"
        )
    if radius + room > half:
        raise InputError(
            f"structure {name}: reaches {radius:.0f} A from its centre and is to be shifted by up to {room:g} A, "
            f"the box of {box} voxels of {voxel_size:g} A has {half:.0f}; use a smaller --max-shift or a larger --box"
        )


def _finish(
    name: str,
    source: str,
    volume: Float32,
    spacing: float,
    box: int,
    voxel_size: float,
    resolution: float,
    radius: float,
    shift: Float64 | None = None,
) -> Structure:
    """The structure of a cube of voxel size `spacing`, moved by `shift` (x, y, z; its voxels)."""
    move = np.zeros(3) if shift is None else shift
    volume = _resampled(volume, spacing, box, voxel_size, resolution, move)
    return Structure(name, source, volume, voxel_size, resolution, radius, principal_axis(volume))


def _resampled(
    volume: Float32, spacing: float, box: int, voxel_size: float, resolution: float, shift: Float64
) -> Float32:
    """A cube at another voxel size and box, blurred, moved by `shift` (x, y, z; old voxels); densities kept."""
    band = full_band(box)
    k = np.fft.fftfreq(box, 1.0 / box)
    z, y, x = np.meshgrid(k, k, np.arange(box // 2 + 1.0), indexing="ij")
    inside = x * x + y * y + z * z <= band * band
    # k cycles per new box, in cycles per old voxel.
    frequencies = np.stack([x[inside], y[inside], z[inside]], axis=1) * spacing / (box * voxel_size)
    values = sample(fourier_grid(volume), frequencies.astype(np.float32), shift=shift)
    values *= np.exp(-(resolution**2) * (frequencies**2).sum(axis=1) / spacing**2).astype(np.float32)
    spectrum = np.zeros(inside.shape, np.complex64)
    spectrum[inside] = values
    out = inverse_transform(spectrum, box) * np.float32((spacing / voxel_size) ** 3)
    return np.asarray(out, dtype=np.float32)
