"""A simulated data set on the disk: boxes, their Fourier weight, STAR files with and without the truth, true maps.

The signal-to-noise ratio is that of the boxes as they lie in the files: the variance of what the noise-free images (or
the noise-free density) leave in a box over the variance of what noise alone leaves, over the whole box and through the
same steps, in the mean over the particles of a class. Everything is linear, so signal and noise go through apart, are
added with the factor that gives the ratio asked for, and are measured on the way. (`simulate_particles` counts both
before the wedge; the wedge takes noise in proportion to Fourier space, of the signal more or less by the pose.)
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faml_gpu.array_backend import Array, fft_module, namespace, on_host, to_host, use_device, working_bytes
from faml_gpu.data import Progress
from faml_gpu.device_info import choose_device, versions
from faml_gpu.errors import InputError
from faml_gpu.geometry import matrix_to_relion, random_rotations
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.mrc import write_mrc
from faml_gpu.io.star import write_star
from faml_gpu.simulate.gridding import FourierGrid, fourier_grid, sample
from faml_gpu.simulate.structures import Structure, load_structure
from faml_gpu.simulate.tilt_series import (
    Optics,
    TiltSeries,
    cut,
    electron_wavelength,
    tilt_angles,
    white_noise,
)
from faml_gpu.threads import cpu_threads
from faml_gpu.weights import centred_from_half, missing_wedge

__all__ = ["DataSet", "FastBoxes", "SimulationOptions", "random_poses", "simulate_data_set"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]
Sources = Sequence[np.random.Generator]

SMALLEST_BOX = 10
PILOT = 100  # particles of a class that the signal's variance is taken from beforehand
SNR_TOLERANCE = 0.05
_VOLUME = (-3, -2, -1)  # axes
_OURS = re.compile(r"particles\.star|truth\.star|truth_class\d{3,}\.mrc|weight\.mrc|simulation\.json")
_OUR_BOX = re.compile(r"\d{6,}\.mrc")


@dataclass(frozen=True)
class SimulationOptions:
    """How particles are simulated; lengths in Angstrom, angles in degrees.

    Attributes
    ----------
    box : N, voxels
    voxel_size : Angstrom
    resolution : of the structures' low-pass filter (1/e); None is three voxels
    snr : see the module; infinity leaves the noise out
    tilt_range, tilt_step, tilt_axis : of the tilt series
    max_shift : shifts are uniform in +- this on each axis; None is two voxels
    about_axis : "x", "y" or "z": the principal axis is parallel to it, and poses differ by a turn about it only
    fast : no images: density and noise behind a missing wedge
    ctf, mtf : whether images have them
    defocus, voltage, cs, amplitude_contrast : micrometre (underfocus positive), kV, mm, share
    wiener : noise-to-signal ratio that the CTF correction assumes
    assembly : of PDB and mmCIF files, see `load_structure`
    float16 : whether boxes are stored so, in half the space
    seed : of all randomness
    """

    box: int = 64
    voxel_size: float = 6.0
    resolution: float | None = None
    snr: float = 0.01
    tilt_range: tuple[float, float] = (-60.0, 60.0)
    tilt_step: float = 3.0
    tilt_axis: Literal["x", "y"] = "y"
    max_shift: float | None = None
    about_axis: Literal["x", "y", "z"] | None = None
    fast: bool = False
    ctf: bool = True
    mtf: bool = True
    defocus: float = 6.0
    voltage: float = 300.0
    cs: float = 2.7
    amplitude_contrast: float = 0.07
    wiener: float = 0.1
    assembly: str | None = None
    float16: bool = False
    seed: int = 0

    @property
    def lowpass(self) -> float:
        """Angstrom, `resolution` as used."""
        return 3 * self.voxel_size if self.resolution is None else self.resolution

    @property
    def shift(self) -> float:
        """Angstrom, `max_shift` as used."""
        return 2 * self.voxel_size if self.max_shift is None else self.max_shift

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        if self.box < SMALLEST_BOX:
            raise InputError(f"--box: found {self.box}, expected {SMALLEST_BOX} voxels or more")
        _positive("--voxel-size", self.voxel_size, "A")
        if not 2 * self.voxel_size <= self.lowpass < math.inf:
            raise InputError(
                f"--resolution: found {self.lowpass:g} A, expected {2 * self.voxel_size:g} A (two voxels) or more"
            )
        if not self.snr > 0:
            raise InputError(f"--snr: found {self.snr:g}, expected more than 0 (inf: no noise)")
        if not 0 <= self.shift < math.inf:
            raise InputError(f"--max-shift: found {self.shift:g} A, expected 0 or more")
        tilt_angles(self.tilt_range, self.tilt_step)
        if self.tilt_axis not in ("x", "y"):
            raise InputError(f"--tilt-axis: found {self.tilt_axis!r}, expected x or y")
        if self.about_axis not in (None, "x", "y", "z"):
            raise InputError(f"--about-axis: found {self.about_axis!r}, expected x, y or z")
        _positive("--voltage", self.voltage, "kV")
        _positive("--wiener", self.wiener, "")
        if not math.isfinite(self.defocus):
            raise InputError(f"--defocus: found {self.defocus}, expected micrometres (underfocus positive)")
        if not 0 <= self.cs < math.inf:
            raise InputError(f"--cs: found {self.cs:g} mm, expected 0 or more")
        if not 0 <= self.amplitude_contrast <= 1:
            raise InputError(f"--amplitude-contrast: found {self.amplitude_contrast:g}, expected 0 to 1 (as 0.07)")
        if self.seed < 0:
            raise InputError(f"--seed: found {self.seed}, expected 0 or more")


@dataclass(frozen=True)
class DataSet:
    """What was simulated.

    Attributes
    ----------
    star, truth_star : particles without and with their poses and classes
    structures : one per class
    rotations (n, 3, 3), shifts (n, 3; voxels), classes (n,; from 0) : the truth
    snr : (K,) measured on the boxes; infinity without noise
    weight : (N, N, N // 2 + 1) float32, of all particles, rfftn layout
    """

    star: Path
    truth_star: Path
    structures: tuple[Structure, ...]
    rotations: Float64
    shifts: Float64
    classes: NDArray[np.int64]
    snr: Float64
    weight: Float32


class Model(Protocol):
    """The way from a structure to boxes, for one particle or several at a time."""

    weight: Float32

    @property
    def particle_bytes(self) -> int:
        """Bytes of intermediate arrays of a particle."""

    def signal(self, grid: FourierGrid, rotation: ArrayLike, shift: ArrayLike) -> Array:
        """Boxes without noise, (..., N, N, N) float32, of poses (..., 3, 3) and (..., 3); shifts in voxels."""

    def noise(self, rngs: np.random.Generator | Sources) -> Array:
        """Boxes of noise alone, (..., N, N, N) float32: one from a source, or one from each of several."""


class FastBoxes:
    """The fast model: the density in its pose and white noise, both behind a missing wedge.

    Parameters
    ----------
    box : N, voxels
    field : voxels that the density is placed in before the box is cut out, N or more
    tilt_range, tilt_axis : of the wedge
    xp : numpy or cupy
    """

    def __init__(self, box: int, field: int, tilt_range: tuple[float, float], tilt_axis: str, xp: Any = np) -> None:
        self.box, self._field = box, field
        self.weight = missing_wedge(box, tilt_range, tilt_axis) * _has_partner(box)
        self._weight = xp.asarray(self.weight)
        k = np.fft.fftfreq(field)
        z, y, x = np.meshgrid(k, k, np.arange(field // 2 + 1) / field, indexing="ij")
        # No grid holds anything beyond 1/2; the margin is for rounding.
        sampled = _has_partner(field) & (x * x + y * y + z * z < 0.25 * (1 + 1e-4))
        if field == box:  # nothing is cut out: what the wedge takes away is not needed
            sampled &= self.weight > 0
        self._frequencies = xp.asarray(np.stack([x[sampled], y[sampled], z[sampled]], axis=1).astype(np.float32))
        self._sampled = xp.asarray(np.flatnonzero(sampled))

    @property
    def particle_bytes(self) -> int:
        """See `Model`."""
        return 6 * 8 * self._field**2 * (self._field // 2 + 1)

    def signal(self, grid: FourierGrid, rotation: ArrayLike, shift: ArrayLike) -> Array:
        """See `Model`."""
        xp, fourier = namespace(self._weight), fft_module(self._weight)
        values = sample(grid, self._frequencies, rotation, shift)
        lead, field, n = values.shape[:-1], self._field, self.box
        spectra = xp.zeros((*lead, field * field * (field // 2 + 1)), np.complex64)
        spectra[..., self._sampled] = values
        spectra = spectra.reshape(*lead, field, field, field // 2 + 1)
        if field != n:
            volumes = cut(fourier.irfftn(spectra, s=(field,) * 3, axes=_VOLUME), n, _VOLUME)
            # The box keeps the origin at index 0, as the spectrum has it.
            spectra = fourier.rfftn(xp.fft.ifftshift(volumes, axes=_VOLUME), axes=_VOLUME)
        volumes = fourier.irfftn(spectra * self._weight, s=(n,) * 3, axes=_VOLUME)
        return xp.fft.fftshift(volumes, axes=_VOLUME).astype(np.float32, copy=False)

    def noise(self, rngs: np.random.Generator | Sources) -> Array:
        """See `Model`."""
        fourier, shape = fft_module(self._weight), (self.box,) * 3
        white = white_noise(rngs, shape, namespace(self._weight))
        spectra = fourier.rfftn(white, axes=_VOLUME) * self._weight
        return fourier.irfftn(spectra, s=shape, axes=_VOLUME).astype(np.float32, copy=False)


class TiltSeriesBoxes:
    """The full model: images of a tilt series, and the box reconstructed from them."""

    def __init__(self, series: TiltSeries) -> None:
        self._series = series
        self.weight = series.weight

    @property
    def particle_bytes(self) -> int:
        """See `Model`."""
        return self._series.particle_bytes

    def signal(self, grid: FourierGrid, rotation: ArrayLike, shift: ArrayLike) -> Array:
        """See `Model`."""
        return self._series.reconstruct(self._series.project(grid, rotation, shift))

    def noise(self, rngs: np.random.Generator | Sources) -> Array:
        """See `Model`."""
        return self._series.reconstruct(self._series.noise(rngs))


def _has_partner(n: int) -> NDArray[np.bool]:
    """Where an rfftn array of an n-voxel box is off the Nyquist planes, on which -k is not stored beside k."""
    k = 2 * np.abs(np.fft.fftfreq(n)) < 1
    return np.asarray(k[:, None, None] & k[:, None] & (2 * np.arange(n // 2 + 1) < n))


def random_poses(
    count: int, max_shift: float, about_axis: str | None, axis: ArrayLike, rngs: Sequence[np.random.Generator]
) -> tuple[Float64, Float64]:
    """Poses of particles, each from its own source of randomness.

    Parameters
    ----------
    count : number of particles
    max_shift : voxels
    about_axis : "x", "y", "z": R takes `axis` to it and then turns about it; None: R from the Haar measure
    axis : (3,) the structure's principal axis
    rngs : one per particle

    Returns
    -------
    rotations (count, 3, 3), shifts (count, 3) in voxels, (x, y, z)
    """
    rotations, shifts = np.empty((count, 3, 3)), np.empty((count, 3))
    for i, rng in enumerate(rngs[:count]):
        if about_axis is None:
            rotations[i] = random_rotations(1, rng)[0]
        else:
            target = np.eye(3)["xyz".index(about_axis)]
            rotations[i] = _turn(target, rng.uniform(0, 2 * np.pi)) @ _onto(np.asarray(axis, dtype=np.float64), target)
        shifts[i] = rng.uniform(-max_shift, max_shift, 3)
    return rotations, shifts


def simulate_data_set(
    structures: Sequence[str | Path],
    counts: Sequence[int],
    output: str | Path,
    options: SimulationOptions | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> DataSet:
    """Simulate particles of each structure and write them with their truth.

    Writes particles/NNNNNN.mrc, weight.mrc (centred cube, rlnCtfImage of every particle), particles.star,
    truth.star (the same with rlnAngle*, rlnOrigin*Angst and rlnClassNumber), truth_classNNN.mrc and simulation.json;
    particles.star last. Each particle draws from streams of its own, named by seed, class and number within the class.
    Noise has variance 1 in the boxes; true maps are on the scale of the boxes.

    Parameters
    ----------
    structures : files or names, see `load_structure`; each is a class
    counts : particles of each class; one number for all, or one per structure
    output : folder
    options : how; None takes the defaults
    device : auto, cpu, cuda or cuda:i
    threads : CPU threads; None takes all cores
    overwrite : remove the simulation that is in the folder
    progress : called with (step, done, total)
    say : takes lines for the user

    Returns
    -------
    DataSet

    Raises
    ------
    InputError
        Options, counts or structures that do not fit, and a folder that is not empty, before anything is written; a
        folder that cannot be written.
    """
    options = options or SimulationOptions()
    options.check()
    counts = _counts(counts, structures)
    folder = _checked_folder(Path(output), overwrite)
    name, _ = choose_device(device)
    tell = say or _nothing
    loaded = tuple(
        load_structure(
            structure,
            box=options.box,
            voxel_size=options.voxel_size,
            resolution=options.lowpass,
            assembly=options.assembly,
            room=options.shift,
        )
        for structure in structures
    )
    for k, structure in enumerate(loaded):
        tell(f"class {k + 1}: {structure.source}; radius {structure.radius:.0f} A; principal axis {_words(structure)}")
    try:
        with cpu_threads(threads) as workers:
            return _simulate(loaded, counts, folder, options, name, workers, progress, tell, overwrite)
    except OSError as error:
        raise InputError(f"output {folder}: cannot be written ({error.strerror or error})") from None


def _simulate(
    structures: tuple[Structure, ...],
    counts: list[int],
    folder: Path,
    options: SimulationOptions,
    device: str,
    workers: int,
    progress: Progress | None,
    tell: Callable[[str], None],
    overwrite: bool,
) -> DataSet:
    xp = _module(device)
    if device != "cpu":
        workers = 2  # one draws noise while the other's work is on the device
    with use_device(device):
        model = _model(structures, options, xp)
        grids = [fourier_grid(xp.asarray(structure.density)) for structure in structures]
    classes = np.repeat(np.arange(len(counts)), counts)
    first = np.concatenate([[0], np.cumsum(counts)])
    rotations, shifts = np.empty((len(classes), 3, 3)), np.empty((len(classes), 3))
    for k, structure in enumerate(structures):
        own = slice(first[k], first[k + 1])
        rngs = [np.random.default_rng([options.seed, k, i, 0]) for i in range(counts[k])]
        rotations[own], shifts[own] = random_poses(
            counts[k], options.shift / options.voxel_size, options.about_axis, structure.axis, rngs
        )

    size = _batch_size(model, grids[0].values)

    def signal(batch: Indices) -> Array:
        return model.signal(grids[classes[batch[0]]], rotations[batch], shifts[batch])

    def noise(batch: Indices) -> Array:
        return model.noise([np.random.default_rng([options.seed, classes[i], i - first[classes[i]], 1]) for i in batch])

    def signal_variances(batch: Indices) -> Float64:
        with use_device(device):
            return _variances(signal(batch))

    noiseless = math.isinf(options.snr)
    with ThreadPoolExecutor(workers) as pool:
        pilots = [np.arange(first[k], min(first[k] + PILOT, first[k + 1])) for k in range(len(counts))]
        everyone = np.concatenate(pilots)
        batches = [batch for pilot in pilots for batch in _batches(pilot, size)]
        variances = np.concatenate(_mapped(pool, signal_variances, batches, "signal", progress))
        of_class = np.array([variances[classes[everyone] == k].mean() for k in _up_to(counts)])
        # Noise of variance 1, or else a signal of variance 1.
        scales = np.sqrt((1.0 if noiseless else options.snr) / of_class)
        level = 0.0
        if not noiseless:
            sampled = everyone[:: max(1, len(everyone) // 16)][:16]
            with use_device(device):
                found = [_variances(noise(batch)) for batch in _batches(sampled, size)]
            level = 1 / math.sqrt(np.concatenate(found).mean())

        _clear(folder, overwrite)
        (folder / "particles").mkdir(parents=True, exist_ok=True)
        names = [f"particles/{i + 1:06d}.mrc" for i in range(len(classes))]

        def make(batch: Indices) -> Float64:
            """Write boxes; the variances of their signal and noise, (2, batch)."""
            with use_device(device):
                made = signal(batch) * np.float32(scales[classes[batch[0]]])
                measured = np.zeros((2, len(batch)))
                measured[0] = _variances(made)
                if not noiseless:
                    random = noise(batch) * np.float32(level)
                    measured[1] = _variances(random)
                    made += random
                made = to_host(made)
            for i, box in zip(batch, made, strict=True):
                write_mrc(folder / names[i], box, options.voxel_size, float16=options.float16)
            return measured

        batches = [batch for k in _up_to(counts) for batch in _batches(np.arange(first[k], first[k + 1]), size)]
        measured = np.concatenate(_mapped(pool, make, batches, "boxes", progress), axis=1)
    with np.errstate(divide="ignore"):
        snr = np.array([np.divide(*measured[:, classes == k].mean(axis=1)) for k in _up_to(counts)])
    result = DataSet(
        folder / "particles.star",
        folder / "truth.star",
        structures,
        rotations,
        shifts,
        classes.astype(np.int64),
        snr,
        model.weight,
    )
    _write_truth(folder, result, scales, options)
    _write_json(folder, result, counts, options, device)
    _write_stars(result, names, options)
    for k, found in enumerate(snr):
        tell(f"class {k + 1}: {counts[k]} boxes, SNR asked {options.snr:g}, measured on the boxes {found:.5g}")
        if not noiseless and abs(found / options.snr - 1) > SNR_TOLERANCE:
            warnings.warn(
                f"class {k + 1}: the measured SNR is {100 * (found / options.snr - 1):+.1f} % off", stacklevel=2
            )
    return result


def _up_to(counts: Sequence[int]) -> range:
    return range(len(counts))


def _batch_size(model: Model, array: Array) -> int:
    """Particles that go through the model at a time, where `array` is.

    What a GPU waits for is launches, so it takes many. A CPU needs as long for each of several as for one alone: one by
    one they share out evenly between threads.
    """
    return 1 if on_host(array) else max(1, working_bytes(array) // model.particle_bytes)


def _batches(particles: Indices, size: int) -> list[Indices]:
    """Particles, `size` at a time."""
    return [particles[start : start + size] for start in range(0, len(particles), size)]


def _variances(boxes: Array) -> Float64:
    """Variance of each box, (n,)."""
    return np.asarray(to_host(boxes.var(axis=_VOLUME, dtype=np.float64)))


def _mapped(
    pool: ThreadPoolExecutor,
    function: Callable[[Indices], Float64],
    batches: Sequence[Indices],
    name: str,
    progress: Progress | None,
) -> list[Float64]:
    """The function's values in order, in threads, with progress in particles."""
    values: list[Float64] = []
    done, total = 0, sum(map(len, batches))
    try:
        for batch, value in zip(batches, pool.map(function, batches), strict=True):
            values.append(value)
            done += len(batch)
            if progress is not None:
                progress(name, done, total)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return values


def _model(structures: Sequence[Structure], options: SimulationOptions, xp: Any) -> Model:
    if options.fast:
        field = max(len(structure.density) for structure in structures)
        return FastBoxes(options.box, field, options.tilt_range, options.tilt_axis, xp)
    optics = None
    if options.ctf:
        optics = Optics(options.defocus, options.voltage, options.cs, options.amplitude_contrast)
        spread = electron_wavelength(options.voltage) * 1e4 * abs(options.defocus) / options.lowpass
        if spread > options.box * options.voxel_size:  # half the width of the images
            warnings.warn(
                f"the CTF spreads detail of {options.lowpass:g} A over {spread:.0f} A, more than the images of "
                f"{2 * options.box * options.voxel_size:.0f} A hold: use a smaller --defocus, or a larger --box",
                stacklevel=2,
            )
    angles = tilt_angles(options.tilt_range, options.tilt_step)
    return TiltSeriesBoxes(
        TiltSeries(
            options.box,
            options.voxel_size,
            angles,
            options.tilt_axis,
            optics=optics,
            detector=options.mtf,
            wiener=options.wiener,
            xp=xp,
        )
    )


def _module(device: str) -> Any:
    """The array module of a device."""
    if device == "cpu":
        return np
    import cupy

    return cupy


def _write_truth(folder: Path, result: DataSet, scales: Float64, options: SimulationOptions) -> None:
    n = options.box
    for k, structure in enumerate(result.structures):
        start = len(structure.density) // 2 - n // 2
        inner = slice(start, start + n)
        volume = structure.density[inner, inner, inner] * np.float32(scales[k])
        write_mrc(folder / f"truth_class{k + 1:03d}.mrc", volume, options.voxel_size)
    write_mrc(folder / "weight.mrc", centred_from_half(result.weight, n), options.voxel_size)


def _write_stars(result: DataSet, names: list[str], options: SimulationOptions) -> None:
    """truth.star, then particles.star: the last file of a whole data set."""
    optics = {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnVoltage": [float(options.voltage)],
        "rlnSphericalAberration": [float(options.cs)],
        "rlnAmplitudeContrast": [float(options.amplitude_contrast)],
        "rlnImagePixelSize": [float(options.voxel_size)],
        "rlnImageSize": [options.box],
        "rlnImageDimensionality": [3],
    }
    n = len(names)
    particles: dict[str, Any] = {
        "rlnImageName": names,
        "rlnCtfImage": ["weight.mrc"] * n,
        "rlnOpticsGroup": [1] * n,
    }
    angles = matrix_to_relion(result.rotations)
    origins = -result.shifts * options.voxel_size
    truth = particles | dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True))
    truth |= dict(zip(("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"), origins.T, strict=True))
    truth["rlnClassNumber"] = result.classes + 1
    write_star(result.truth_star, {"optics": optics, "particles": truth})
    write_star(result.star, {"optics": optics, "particles": particles})


def _write_json(folder: Path, result: DataSet, counts: Sequence[int], options: SimulationOptions, device: str) -> None:
    used = asdict(options) | {"resolution": options.lowpass, "max_shift": options.shift}
    used["tilt_range"] = list(options.tilt_range)
    facts = {
        "format": 1,
        "snr_definition": "variance of the noise-free box over variance of the box of noise alone, after the same "
        "steps, whole box, means over the particles of a class",
        "snr_asked": _json_number(options.snr),
        "classes": [
            {
                "name": structure.name,
                "source": structure.source,
                "count": count,
                "snr_measured": _json_number(float(snr)),
                "radius": structure.radius,
                "principal_axis": structure.axis.tolist(),
                "truth": f"truth_class{k + 1:03d}.mrc",
            }
            for k, (structure, count, snr) in enumerate(zip(result.structures, counts, result.snr, strict=True))
        ],
        "options": {key: _json_number(value) if isinstance(value, float) else value for key, value in used.items()},
        "tilts": [] if options.fast else tilt_angles(options.tilt_range, options.tilt_step).tolist(),
        "device": device,
        "versions": versions(),
    }
    with atomic_path(folder / "simulation.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _json_number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"


def _counts(counts: Sequence[int], structures: Sequence[str | Path]) -> list[int]:
    if not structures:
        raise InputError("structures: found none, expected a file or the name of a phantom for each class")
    if len(counts) not in (1, len(structures)):
        raise InputError(
            f"--count: given {len(counts)} times for {len(structures)} structures, expected once, or once for each"
        )
    if min(counts) < 1:
        raise InputError(f"--count: found {min(counts)}, expected 1 or more particles")
    return list(counts) if len(counts) == len(structures) else [counts[0]] * len(structures)


def _checked_folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder}: found a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"output {folder}: found files in it, expected an empty folder; give --overwrite to replace a simulation, "
            "or another folder"
        )
    return folder


def _clear(folder: Path, overwrite: bool) -> None:
    """Remove an earlier simulation; files of other names stay. particles.star goes first: without it there is none."""
    if not overwrite or not folder.is_dir():
        return
    (folder / "particles.star").unlink(missing_ok=True)
    ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    boxes = folder / "particles"
    if boxes.is_dir():
        ours += [path for path in boxes.iterdir() if _OUR_BOX.fullmatch(path.name)]
    for path in ours:
        path.unlink()


def _positive(name: str, value: float, unit: str) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name}: found {value:g}, expected more than 0 {unit}".rstrip())


def _words(structure: Structure) -> str:
    return "(" + ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in structure.axis) + ") (x, y, z)"


def _onto(axis: Float64, target: Float64) -> Float64:
    """The shortest rotation that takes one unit vector to another, (3, 3)."""
    cross, dot = np.cross(axis, target), float(axis @ target)
    if dot < -1 + 1e-12:
        return _turn(np.roll(target, 1), np.pi)
    skew = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    return np.asarray(np.eye(3) + skew + skew @ skew / (1 + dot))


def _turn(axis: Float64, angle: float) -> Float64:
    """Rotation by an angle (radians) about a unit vector, right-handed, (3, 3)."""
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew)


def _nothing(line: str) -> None:
    pass
