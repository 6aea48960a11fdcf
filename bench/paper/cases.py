"""The paper's tests, one configuration each: what is simulated, what the paper found, fixed before any run.

SNR: variance of the volume reconstructed from noise-free tilts over that of the volume from noise-only tilts, whole
box, same pipeline. `snr_reason` says where the number comes from; `--sweep` repeats a case at half and twice of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

__all__ = ["CASES", "DATA", "METHODS", "Case", "Paper", "Specimen", "full", "quick"]

# Beside the checkout, or where the environment says.
DATA = Path(os.environ.get("FAML_GPU_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

# What is run on each data set: `ceiling` is the average made with the true poses and classes.
METHODS = ("ceiling", "fa", "fa-plain", "paper", "default")

Kind = Literal["simulated", "real", "timing", "profile", "sampling", "picture"]


@dataclass(frozen=True)
class Specimen:
    """One structure of a case: a file below `DATA` or the name of a phantom, and how many particles of it.

    `full_count` is the paper's number of particles where `count` is less, so that a CPU can do it.
    """

    name: str
    source: str
    count: int
    point_group: str = "C1"
    full_count: int | None = None

    @property
    def is_file(self) -> bool:
        return "/" in self.source


@dataclass(frozen=True)
class Paper:
    """What the paper reports: r (or symmetry score) and F1, of FAML and of FA; r per class; seconds an iteration.

    `claim`: what it says in words, of which no other field holds the figures.
    """

    r_faml: tuple[float, ...] = ()
    r_fa: tuple[float, ...] = ()
    f1_faml: float | None = None
    f1_fa: float | None = None
    symmetry_faml: float | None = None
    symmetry_fa: float | None = None
    seconds_faml: float | None = None  # on 12 processes, as the other two
    seconds_fa: float | None = None
    seconds_relion: float | None = None
    claim: str = ""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A test. Lengths in Angstrom, angles in degrees, `max_shift` in voxels (uniform on each axis).

    `radius` of the mask and of the sphere r is taken in; None: that of the (largest) structure. `resolution` is the
    finest that any method aligns at (its preset's schedule of the band ends there); None: all that the voxels hold.
    `seeds` is how many the issue asks for: 3 where a run takes under 20 minutes. `passes`: a row with a pass line.
    """

    name: str
    kind: Kind
    what: str
    specimens: tuple[Specimen, ...] = ()
    box: int = 64
    voxel_size: float = 6.0
    snr: float = 0.01
    snr_reason: str = "the paper's"
    tilt_range: tuple[float, float] = (-60.0, 60.0)
    tilt_step: float = 3.0
    max_shift: float = 3.0
    about_axis: Literal["x", "y", "z"] | None = None
    radius: float | None = None
    resolution: float | None = None
    iterations: int = 20
    seeds: int = 3
    stand_in: bool = False
    stand_in_for: str = ""
    symmetry_order: int | None = None
    methods: tuple[str, ...] = METHODS
    passes: bool = False
    paper: Paper = Paper()
    files: tuple[str, ...] = ()  # of a real case, below DATA

    def missing(self) -> list[str]:
        """Files this case needs and does not find, below `DATA`."""
        needed = [*self.files, *(s.source for s in self.specimens if s.is_file)]
        return [name for name in needed if not (DATA / name).exists()]


# Of simulated boxes of 6 Angstrom voxels: where the simulated density has fallen to 1/e. What is finer holds no signal
# at these SNR, and takes two thirds of the time.
ALIGNED_AT = 18.0

GROEL = "structures/GroEL_14mer_1KP8A_on_1MNF.pdb.gz"
GROEL_GROES = "structures/1AON.pdb.gz"
RIBOSOME_70S = "structures/4V5D_one70S.cif.gz"
RIBOSOME_80S = "maps/ribosome80S_4V7R_5A.mrc"
TRIC = "maps/TRiC_4V94_single_10A.mrc"
PROTEASOME_26S = "maps/proteasome26S_4CR2_5A.mrc"
RAT_NEURON = "the rat-neuron tomograms of the paper: same box, voxel size, tilt range and count"


def _timing(box: int, faml: int, fa: int, relion: int) -> Case:
    return Case(
        f"timing-{box}",
        "timing",
        f"Table 1: 70S ribosome, N 20, {box}³, SNR 0.02",
        (Specimen("ribosome70S", RIBOSOME_70S, 20),),
        box=box,
        voxel_size=384.0 / box,
        snr=0.02,
        max_shift=3.0 * box / 64,
        seeds=3 if box < 128 else 1,
        methods=("ceiling", "fa", "paper", "default"),
        paper=Paper(seconds_faml=faml, seconds_fa=fa, seconds_relion=relion),
    )


_ALL = (
    Case(
        "groel-lowsnr",
        "simulated",
        "GroEL, N 100, 64³, voxel 6 Å, SNR 0.003, ±60°",
        (Specimen("GroEL", GROEL, 100, "D7"),),
        snr=0.003,
        resolution=ALIGNED_AT,
        passes=True,
        paper=Paper((0.77,), (0.19,)),
    ),
    Case(
        "groel-preferred",
        "simulated",
        "GroEL, N 50, 64³, voxel 6 Å, SNR 0.01, ±40°, principal axis parallel to Y, rotation about Y only",
        (Specimen("GroEL", GROEL, 50, "D7"),),
        tilt_range=(-40.0, 40.0),
        resolution=ALIGNED_AT,
        about_axis="y",
        passes=True,
        paper=Paper((0.78,), (0.49,)),
    ),
    Case(
        "ribosome-rat",
        "simulated",
        "80S ribosome, N 859, 40³, voxel 13.68 Å, −50…+70°",
        (Specimen("ribosome80S", RIBOSOME_80S, 859),),
        box=40,
        voxel_size=13.68,
        snr=0.01035,
        snr_reason="what the paper measured on its set",
        tilt_range=(-50.0, 70.0),
        max_shift=2.0,
        stand_in=True,
        stand_in_for=RAT_NEURON,
        paper=Paper((0.61,), (0.66,), note="r with a map refined elsewhere"),
    ),
    Case(
        "tmv",
        "simulated",
        "TMV helix, N 400, 64³, voxel 5.4 Å, ±60°, axis along Y, rotation about it unknown",
        (Specimen("TMV", "tmv", 400, full_count=2742),),
        voxel_size=5.4,
        snr=0.0023,
        snr_reason="what the paper measured on its set",
        about_axis="y",
        radius=135.0,
        stand_in=True,
        stand_in_for="the paper's experimental TMV set",
        symmetry_order=17,
        resolution=ALIGNED_AT,
        paper=Paper(symmetry_faml=0.47, symmetry_fa=0.25),
    ),
    Case(
        "groel-ribosome",
        "simulated",
        "GroEL 100 + 70S ribosome 100, 64³, voxel 6 Å, SNR 0.01, ±60°, K 2",
        (Specimen("GroEL", GROEL, 100, "D7"), Specimen("ribosome70S", RIBOSOME_70S, 100)),
        resolution=ALIGNED_AT,
        passes=True,
        paper=Paper((0.88, 0.85), (0.84, 0.75), 1.00, 0.99),
    ),
    Case(
        "tric-proteasome",
        "simulated",
        "TRiC 125 + capped 26S proteasome 200, 40³, voxel 13.68 Å, −50…+70°, K 2",
        (Specimen("TRiC", TRIC, 125, "D8"), Specimen("proteasome26S", PROTEASOME_26S, 200)),
        box=40,
        voxel_size=13.68,
        snr=0.01,
        snr_reason="the ribosomes of the same tomograms measured 0.01035, rounded",
        tilt_range=(-50.0, 70.0),
        max_shift=2.0,
        stand_in=True,
        stand_in_for=RAT_NEURON,
        passes=True,
        paper=Paper((0.41, 0.45), (0.08, 0.16), 0.863, 0.462),
    ),
    Case(
        "groel-groes",
        "simulated",
        "GroEL 200 + GroEL-GroES 200, 32³, voxel 12 Å, SNR 0.02, ±65°, K 2",
        (Specimen("GroEL", GROEL, 200, "D7"), Specimen("GroEL-GroES", GROEL_GROES, 200, "C7")),
        box=32,
        voxel_size=12.0,
        snr=0.02,
        snr_reason="set in advance: purified protein in ice, so twice that of the crowded sets",
        tilt_range=(-65.0, 65.0),
        max_shift=2.0,
        stand_in=True,
        stand_in_for="the paper's experimental GroEL and GroEL-GroES boxes",
        passes=True,
        paper=Paper((0.87, 0.78), (0.40, 0.24), note="RELION's predecessor on all 780: 0.88, 0.81"),
    ),
    _timing(32, 56, 7, 340),
    _timing(64, 150, 27, 340),
    _timing(128, 449, 143, 921),
    Case(
        "profile",
        "profile",
        "Fig. 10: share of each step of an iteration at 128³, N 20, whole band",
        (Specimen("ribosome70S", RIBOSOME_70S, 20),),
        box=128,
        voxel_size=3.0,
        snr=0.02,
        max_shift=6.0,
        iterations=3,
        seeds=1,
        methods=("paper", "default"),
        paper=Paper(claim="the maximum-likelihood update takes 66 % of an iteration"),
    ),
    Case(
        "sampling",
        "sampling",
        "3.4: the set of 50 matched poses against uniform grids of 1000 poses; GroEL, N 50, 32³, SNR 0.01",
        (Specimen("GroEL", GROEL, 50, "D7"),),
        box=32,
        voxel_size=12.0,
        max_shift=2.0,
        iterations=10,
        methods=("ceiling", "matched-50", "grid-1000", "grid-1000-shifts"),
        paper=Paper(claim="a uniform grid of the same cost has a resolution too low for any competitive result"),
    ),
    Case(
        "figure-2",
        "picture",
        "x–z slices of a GroEL box over SNR and tilt range",
        (Specimen("GroEL", GROEL, 1, "D7"),),
        snr=1.0,
        max_shift=0.0,
        seeds=1,
        methods=("picture",),
    ),
    Case(
        "insitu70S",
        "real",
        "40 real 70S ribosomes in situ, 32³, 12 Å, no start model",
        box=32,
        voxel_size=12.0,
        radius=150.0,
        snr_reason="real data",
        paper=Paper(note="not in the paper"),
        files=(
            "insitu70S/particles.star",
            "insitu70S/reference_poses.star",
            "insitu70S/reference_relion_reconstruction.mrc",
        ),
    ),
    Case(
        "microtubule",
        "real",
        "boxes cut along a real 13-protofilament microtubule, 32³, 10.52 Å, rotation about the axis unknown",
        box=32,
        voxel_size=10.52,
        radius=140.0,
        snr_reason="real data",
        stand_in=True,
        stand_in_for="the paper's TMV: tubular, helical, missing wedge",
        symmetry_order=13,
        methods=("fa", "fa-plain", "paper", "default"),
        paper=Paper(note="TMV, 17-fold: FAML 0.47, FA 0.25"),
        files=("microtubule/13pf_1.052nm.tif",),
    ),
)
CASES = {case.name: case for case in _ALL}


def full(case: Case) -> Case | None:
    """The case with the paper's number of particles, a row of its own; None where it has that anyway."""
    if all(s.full_count is None for s in case.specimens):
        return None
    what, specimens = case.what, []
    for s in case.specimens:
        count = s.full_count or s.count
        what = what.replace(f"N {s.count},", f"N {count},")
        specimens.append(replace(s, count=count, full_count=None))
    return replace(case, name=f"{case.name}-full", what=what, specimens=tuple(specimens), seeds=1)


def quick(case: Case) -> Case:
    """The same with phantoms, a tiny box and few particles: says that the machinery runs, nothing else."""
    phantoms = ("groel", "ribosome")
    return replace(
        case,
        what=f"{case.what} (quick: phantoms, 16³)",
        specimens=tuple(
            Specimen(s.name, phantom, 4, {"groel": "D7"}.get(phantom, "C1"))
            for s, phantom in zip(case.specimens, phantoms, strict=False)
        ),
        box=16,
        voxel_size=24.0,
        snr=0.5,
        max_shift=1.0,
        radius=None if case.radius is None else 130.0,
        resolution=None,
        iterations=2,
    )
