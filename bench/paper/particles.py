"""The particles of a case with their truth: simulated through a tilt series, or read from the real data."""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from cases import DATA, Case, Specimen
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from faml_gpu import metrics
from faml_gpu.data import ParticleSource
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import ArrayParticles, open_particles
from faml_gpu.simulate import SimulationOptions, simulate_data_set
from faml_gpu.weights import missing_wedge

__all__ = ["Sample", "make_sample"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Particles and what is known of them.

    Attributes
    ----------
    particles : what a run gets
    truth : (N, N, N) map of each structure; none for data without
    names, radii (Angstrom), groups : of the structures; the point group (g, 3, 3) in the truth map's frame, or None
    rotations, shifts, classes : true poses (voxels) and classes, where `truth` is not empty
    mask_radius : Angstrom, of every method's mask
    about : JSON-ready, what was made or read
    """

    particles: ParticleSource
    voxel_size: float
    truth: list[Float32]
    names: list[str]
    radii: list[float]
    groups: list[Float64 | None]
    rotations: Float64
    shifts: Float64
    classes: Int64
    mask_radius: float
    symmetry_order: int | None = None
    about: dict[str, Any] = field(default_factory=dict)


def make_sample(case: Case, snr_factor: float, seed: int, work: Path) -> Sample:
    """The data set of a case; seeds name independent data sets (real data are the same for all)."""
    if case.name == "insitu70S":
        return _insitu(case)
    if case.name == "microtubule":
        return _microtubule(case)
    return _simulated(case, snr_factor, seed, work)


def _simulated(case: Case, snr_factor: float, seed: int, work: Path) -> Sample:
    """Through a tilt series with CTF and MTF; the files are read back and removed."""
    options = SimulationOptions(
        box=case.box,
        voxel_size=case.voxel_size,
        snr=case.snr * snr_factor,
        tilt_range=case.tilt_range,
        tilt_step=case.tilt_step,
        max_shift=case.max_shift * case.voxel_size,
        about_axis=case.about_axis,
        seed=seed,
    )
    work.mkdir(parents=True, exist_ok=True)
    files = [structure_file(s, work) if s.is_file else s.source for s in case.specimens]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        made = simulate_data_set(
            files, [s.count for s in case.specimens], folder, options, device="cpu", overwrite=True
        )
        source = open_particles(made.star)
        batch = source.read(np.arange(len(source)))
        truth = [read_mrc(Path(folder) / f"truth_class{k + 1:03d}.mrc")[0] for k in range(len(made.structures))]
    radii = [case.radius or min(s.radius, _widest(case)) for s in made.structures]
    return Sample(
        ArrayParticles(batch.boxes, case.voxel_size, batch.weights, batch.weight_index),
        case.voxel_size,
        truth,
        [s.name for s in case.specimens],
        radii,
        [
            None if case.about_axis else group_about(specimen.point_group, structure.axis, volume)
            for specimen, structure, volume in zip(case.specimens, made.structures, truth, strict=True)
        ],
        made.rotations,
        made.shifts,
        made.classes,
        max(radii),
        case.symmetry_order,
        {
            "snr_measured": [float(snr) for snr in made.snr],
            "structures": [s.source for s in made.structures],
            "radius": [s.radius for s in made.structures],
            "low-pass": options.lowpass,
            "tilts": [*case.tilt_range, case.tilt_step],
            "optics": [options.defocus, options.voltage, options.cs, options.amplitude_contrast],
        },
    )


def _widest(case: Case) -> float:
    """Largest radius of a mask that falls off within the box, Angstrom."""
    return (case.box / 2 - 3 + 0.5) * case.voxel_size


def structure_file(specimen: Specimen, work: Path) -> Path:
    """The file of a structure; where all occupancies are 0 (a model put together by hand), a copy with 1."""
    path = DATA / specimen.source
    if not path.name.endswith(".pdb.gz"):
        return path
    structure = gemmi.read_structure(str(path))
    if any(site.atom.occ > 0 for site in structure[0].all()):
        return path
    for site in structure[0].all():
        site.atom.occ = 1.0
    work.mkdir(parents=True, exist_ok=True)
    copy = work / path.name
    with atomic_path(copy) as temporary:
        temporary.write_bytes(gzip.compress(structure.make_pdb_string().encode(), mtime=0))
    return copy


def group_about(name: str, axis: Float64, volume: Float32) -> Float64:
    """The point group `name` (Cn or Dn) of a structure in its own frame: the n-fold along `axis`.

    The azimuth of a two-fold axis of Dn is where turning by 180 degrees about it changes the map least.
    """
    group = metrics.point_group(name)
    turn = Rotation.align_vectors([axis], [[0.0, 0.0, 1.0]])[0]
    if name[0].upper() == "C":
        q = turn.as_matrix()
        return np.asarray(q @ group @ q.T)
    order = int(name[1:])

    def placed(azimuth: float) -> Float64:
        return np.asarray((turn * Rotation.from_euler("z", azimuth, degrees=True)).as_matrix())

    def fit(azimuth: float) -> float:
        q = placed(azimuth)
        return metrics.correlation(volume, metrics.rotate_map(volume, q @ np.diag([1.0, -1.0, -1.0]) @ q.T))

    # Two-fold axes repeat every 180 / n degrees.
    azimuths = np.linspace(0.0, 180.0 / order, 13)[:-1]
    q = placed(max(azimuths, key=fit))
    return np.asarray(q @ group @ q.T)


def _insitu(case: Case) -> Sample:
    folder = DATA / "insitu70S"
    particles = open_particles(folder / "particles.star")
    poses = open_particles(folder / "reference_poses.star", use_poses=True).poses
    assert poses is not None
    reference, _ = read_mrc(folder / "reference_relion_reconstruction.mrc")
    n, radius = len(particles), case.radius or 150.0
    return Sample(
        particles,
        particles.voxel_size,
        [reference],
        ["ribosome70S"],
        [radius],
        [np.eye(3)[None]],
        poses.rotations,
        poses.shifts,
        np.zeros(n, np.int64),
        radius,
        about={"particles": n, "truth": "RELION's reconstruction in the poses refined elsewhere"},
    )


# Voxels (x, y) of the real microtubule's axis at both ends of the piece, and its z: where the cross-section, averaged
# along the axis, is sharpest.
MICROTUBULE_ENDS = ((84.5, 0.0), (18.5, 206.0))
MICROTUBULE_Z = 17.5
MICROTUBULE_STEP = 4  # voxels, 42 Angstrom: about a tubulin monomer


def _microtubule(case: Case) -> Sample:
    """Boxes along a straight piece of a microtubule, a monomer apart: they overlap, so their noise is not independent.

    What the tomogram's tilt range was is not said; +-60 degrees about Y are assumed. Protein is bright in the file.
    """
    with Image.open(DATA / case.files[0]) as stack:
        pages = []
        for page in range(getattr(stack, "n_frames", 1)):
            stack.seek(page)
            pages.append(np.asarray(stack, dtype=np.float32))
    volume = np.stack(pages)  # [z, y, x]
    (x0, y0), (x1, y1) = MICROTUBULE_ENDS
    half, boxes = case.box // 2, []
    z = round(MICROTUBULE_Z)
    for y in range(half, volume.shape[1] - half + 1, MICROTUBULE_STEP):
        x = round(x0 + (x1 - x0) * (y - y0) / (y1 - y0))
        if half <= x <= volume.shape[2] - half:
            boxes.append(volume[z - half : z + half, y - half : y + half, x - half : x + half])
    return Sample(
        ArrayParticles(np.stack(boxes), case.voxel_size, missing_wedge(case.box, case.tilt_range)),
        case.voxel_size,
        [],
        [],
        [],
        [],
        np.zeros((0, 3, 3)),
        np.zeros((0, 3)),
        np.zeros(0, np.int64),
        case.radius or _widest(case),
        case.symmetry_order,
        {"particles": len(boxes), "tilt_range": "assumed"},
    )
