"""Every choice of a run, and what the presets `default` and `paper` mean by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from faml_gpu.errors import InputError

__all__ = ["GROWING", "PRESETS", "Options", "Preset"]

GROWING = 0.6  # of the iterations: then a band that goes by the schedule is whole, and nothing is held back any more


@dataclass(frozen=True)
class Preset:
    """The choices that tell the presets apart (DESIGN section 3).

    Attributes
    ----------
    magnitudes : "centred" takes |X| of the masked particle, less its mean per shell over the observed voxels;
        "plain" takes |X|
    noise : one variance per Fourier "shell", or a "single" one
    band : default of the option
    measure : rotations of the Voronoi points from "haar" or uniform "euler" angles
    update, sampler : defaults of the options
    poses : of the magnitude sampler: candidates "refined" by the likelihood, last iteration's among them, or as found
        on the "grid" of c~
    regularization : default of the option
    bandwidth : by "rule" (enough for the band and the mask, at most 36), or "fixed" at 36, as the authors' program
    noise_groups, folds, reseed : defaults of the options
    """

    magnitudes: Literal["centred", "plain"]
    noise: Literal["shell", "single"]
    band: Literal["auto", "evidence", "growing", "full"]
    measure: Literal["haar", "euler"]
    update: Literal["explore", "ratio", "wiener", "printed"]
    sampler: Literal["magnitude", "joint"]
    poses: Literal["refined", "grid"]
    regularization: float
    bandwidth: Literal["rule", "fixed"]
    noise_groups: Literal["auto", "none", "optics", "tomogram"]
    folds: int
    reseed: bool


PRESETS: dict[str, Preset] = {
    "default": Preset("centred", "shell", "auto", "haar", "explore", "joint", "refined", 1.0, "rule", "auto", 10, True),
    "paper": Preset("plain", "single", "full", "euler", "printed", "magnitude", "grid", 0.0, "fixed", "none", 1, False),
}


@dataclass(frozen=True)
class Options:
    """Options of a run; lengths in Angstrom, angles in degrees. None means: derived from the data.

    Attributes
    ----------
    n_classes : K
    method : "faml" or "fa" (best single pose and class per particle)
    preset : "default" or "paper"
    sampler : how poses are proposed and what each stands for: "magnitude" (of the paper: the best matches of |X|, and
        their Voronoi shares) or "joint" (the pose integral on a grid of rotations and shifts, phases kept)
        (default: by preset; `fa` takes "magnitude")
    update : averages as the weighted "ratio" sum P R^-1(w X) / sum P R^-1 w, which maximises the likelihood over A in
        one step; the same with noise held down and no orientation favoured for being seen ("wiener", see
        `maximization.wiener_factor`); "explore", the second, and more held down at first (see
        `Plan.caution`); or Eq. 10 as "printed", which fills the missing wedge from the old average and so moves only
        part of the way, and interpolates w and w X apart (default: by preset; `fa` takes "ratio")
    iterations : most iterations
    folds : each particle is compared with averages of the other particles: of so many folds all but its own; 1: with
        averages it is part of, as published (default: by preset; `fa` takes 1)
    reseed : classes that have become empty are begun anew, a few times, from the particles that the others explain
        worst (see `reseeding`; default: by preset)
    starts : random starts that are begun, of which the likeliest goes on
    seed : of all randomness
    device : "auto", "cpu" or "cuda[:i]"
    threads : CPU threads; None: all cores this process may use
    mask_radius : of the soft spherical mask (default 0.8 of half the box)
    resolution : finest resolution used in alignment and likelihood (default: full band)
    band : how far it reaches by the iteration: "growing" over the first 60 % of them; as far as two halves of the
        particles agree, whenever that is ("evidence", see `resolution`; while several `starts` are tried, not beyond
        where all begin); or "full" from the start (default: by preset; that of `default` is `plan.band_rule`)
    bandwidth : L of the harmonics (degrees l < L; default: by rule, at most 36)
    candidates : most candidate poses per particle and class
    max_shift : largest shift of a particle (default: an eighth of the box)
    symmetry : point group of the structure, with RELION's axes (`symmetry.point_group`)
    helix : rise (Angstrom) and twist (degrees) per subunit of a filament along z of the average
    regularization : pull of the averages towards their mean, in particles that show the mean per particle of a class
        of average size, at the start; falls to 0 over the first 60 % of the iterations (default: by preset)
    noise_groups : particles that have a noise curve of their own: those of an "optics" group or of a "tomogram",
        "none", or "auto": optics groups, where the input has them and particles have scales or are not normalised.
        Groups of few particles share the curve of all (see `noise.FEWEST`; default: by preset)
    scale_correction : the average is multiplied by a number in each particle, found with its poses (contrast, ice); an
        offset needs none: the mean outside the mask is always subtracted
    halves : then two halves of each class are averaged apart, see `halves.refine_halves`
    b_factor : of their final map, square Angstrom, see `fsc.final_map`; negative sharpens (default: neither)
    padding : zero padding before interpolation in Fourier space
    invert : the protein is dark in the input
    normalize : divide each box by its standard deviation outside the mask; the mean there is subtracted in any case
    """

    n_classes: int = 1
    method: Literal["faml", "fa"] = "faml"
    preset: Literal["default", "paper"] = "default"
    sampler: Literal["magnitude", "joint"] | None = None
    update: Literal["explore", "ratio", "wiener", "printed"] | None = None
    iterations: int = 20
    folds: int | None = None
    reseed: bool | None = None
    starts: int = 1
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    mask_radius: float | None = None
    resolution: float | None = None
    band: Literal["evidence", "growing", "full"] | None = None
    bandwidth: int | None = None
    candidates: int = 50
    max_shift: float | None = None
    symmetry: str = "C1"
    helix: tuple[float, float] | None = None
    regularization: float | None = None
    noise_groups: Literal["auto", "none", "optics", "tomogram"] | None = None
    scale_correction: bool = False
    halves: bool = False
    b_factor: float | None = None
    padding: int = 2
    invert: bool = False
    normalize: bool = True

    def __post_init__(self) -> None:
        checks = [
            (self.n_classes >= 1, "n_classes", self.n_classes, "at least 1"),
            (self.method in ("faml", "fa"), "method", self.method, "'faml' or 'fa'"),
            (self.preset in PRESETS, "preset", self.preset, " or ".join(map(repr, PRESETS))),
            (self.sampler in (None, "magnitude", "joint"), "sampler", self.sampler, "'magnitude' or 'joint'"),
            (
                self.update in (None, "explore", "ratio", "wiener", "printed"),
                "update",
                self.update,
                "'explore', 'ratio', 'wiener' or 'printed'",
            ),
            (
                not (self.sampler == "joint" and self.method == "fa"),
                "sampler",
                "joint",
                "'magnitude': method 'fa' takes one pose and integrates over none",
            ),
            (
                not (self.folds not in (None, 1) and self.method == "fa"),
                "folds",
                self.folds,
                "1: method 'fa' compares with averages of all particles",
            ),
            (
                not (self.update not in (None, "ratio") and self.method == "fa"),
                "update",
                self.update,
                "'ratio': that of method 'fa'",
            ),
            (self.iterations >= 1, "iterations", self.iterations, "at least 1"),
            (self.folds is None or 1 <= self.folds <= 1000, "folds", self.folds, "1 to 1000"),
            (1 <= self.starts <= 1000, "starts", self.starts, "1 to 1000"),
            (self.seed >= 0, "seed", self.seed, "0 or more"),
            (self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1"),
            (self.mask_radius is None or self.mask_radius > 0, "mask_radius", self.mask_radius, "more than 0 A"),
            (self.resolution is None or self.resolution > 0, "resolution", self.resolution, "more than 0 A"),
            (
                self.band in (None, "evidence", "growing", "full"),
                "band",
                self.band,
                "'evidence', 'growing' or 'full'",
            ),
            (self.bandwidth is None or 4 <= self.bandwidth <= 128, "bandwidth", self.bandwidth, "4 to 128"),
            (1 <= self.candidates <= 1000, "candidates", self.candidates, "1 to 1000"),
            (self.max_shift is None or self.max_shift >= 0, "max_shift", self.max_shift, "0 A or more"),
            (
                self.regularization is None or 0 <= self.regularization <= 100,
                "regularization",
                self.regularization,
                "0 to 100",
            ),
            (
                self.noise_groups in (None, "auto", "none", "optics", "tomogram"),
                "noise_groups",
                self.noise_groups,
                "'auto', 'none', 'optics' or 'tomogram'",
            ),
            (self.halves or not self.b_factor, "b_factor", self.b_factor, "none without halves: it sharpens their map"),
            (self.padding in (1, 2, 3, 4), "padding", self.padding, "1, 2, 3 or 4"),
        ]
        for valid, name, found, expected in checks:
            if not valid:
                raise InputError(f"option {name}: found {found!r}, expected {expected}")

    @cached_property
    def choices(self) -> Preset:
        """What the preset says, and the options that overrule it."""
        preset = PRESETS[self.preset]
        preset = replace(preset, noise_groups=self.noise_groups or preset.noise_groups, band=self.band or preset.band)
        preset = replace(preset, reseed=preset.reseed if self.reseed is None else self.reseed)
        if self.method == "fa":
            return replace(preset, sampler="magnitude", update="ratio", folds=1)
        preset = replace(preset, folds=self.folds or preset.folds)
        return replace(preset, sampler=self.sampler or preset.sampler, update=self.update or preset.update)
