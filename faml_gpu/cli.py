"""The commands of `faml-gpu`, `average` and `classify` first: calls, progress and errors.

Only light modules are imported at the top, so that --help answers at once.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

import typer
from rich.console import Console

from faml_gpu import __version__
from faml_gpu.errors import InputError
from faml_gpu.options import GROWING
from faml_gpu.stopping import Stopping

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from faml_gpu.data import IterationRecord

__all__ = ["app", "main"]

INPUT_PANEL, START_PANEL, METHOD_PANEL, RUN_PANEL = "Input", "Start", "Method", "Run and output"
PARTICLES_PANEL, IMAGING_PANEL = "Particles", "Imaging"  # of `simulate`
TOLD_EVERY = 60.0  # seconds, in a log, of a step that takes long
TOLD_FROM = 1.0  # seconds: quicker steps get no line

app = typer.Typer(
    help="Average and classify cryo-electron subtomograms without a reference (FAML).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _from_config(context: typer.Context, path: Path | None) -> Path | None:
    """What the file says takes the place of the defaults: the command line wins."""
    if path is not None:
        from faml_gpu.config import read_config

        names = {
            opt.removeprefix("--").replace("-", "_"): parameter.name
            for parameter in context.command.params
            for opt in ([opt for opt in parameter.opts if opt.startswith("--")] or [str(parameter.name)])
            if parameter.name != "config"
        }
        hints = get_type_hints(Shared) | {"particles": str, "n_classes": int}
        try:
            found = read_config(path, {name: hints[str(parameter)] for name, parameter in names.items()})
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        context.default_map = {str(names[name]): value for name, value in found.items()}
        _resumed(context, bool(context.params.get("resume")))
    return path


def _resumed(context: typer.Context, resume: bool) -> bool:
    """A run begun with `overwrite` in its file is gone on with by --resume."""
    if resume and context.default_map:
        context.default_map.pop("overwrite", None)
    return resume


@dataclass(frozen=True)
class Shared:
    """Options that `average` and `classify` have in common, as the command line shows them."""

    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for maps, STAR files and checkpoints.", show_default=False)
    ]

    tilt_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LO HI",
            help="Lowest and highest tilt of the tilt series, degrees, such as -60 60: sets the missing wedge. "
            "Needed unless the STAR file has rlnCtfImage or the Dynamo table has it.",
            rich_help_panel=INPUT_PANEL,
        ),
    ] = None
    tilt_axis: Annotated[
        Literal["x", "y"],
        typer.Option(help="Axis of the boxes that the stage tilted about.", rich_help_panel=INPUT_PANEL),
    ] = "y"
    voxel_size: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Voxel size, if the files do not say it (or to check what they say).",
            rich_help_panel=INPUT_PANEL,
        ),
    ] = None
    boxes: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of a Dynamo table's boxes (particle_000001.em ...), if they are not beside it.",
            rich_help_panel=INPUT_PANEL,
        ),
    ] = None
    invert: Annotated[
        bool,
        typer.Option("--invert", help="The protein is dark in the boxes (low values).", rich_help_panel=INPUT_PANEL),
    ] = False
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize",
            help="Bring the background of each box to mean 0 and standard deviation 1.",
            rich_help_panel=INPUT_PANEL,
        ),
    ] = True

    use_poses: Annotated[
        bool,
        typer.Option(
            "--use-poses",
            help="Start from the angles, origins and classes in the STAR file instead of from nothing.",
            rich_help_panel=START_PANEL,
        ),
    ] = False
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="MAP",
            help="Start from this map (.mrc, protein bright; box and voxel size of the particles).",
            rich_help_panel=START_PANEL,
        ),
    ] = None
    initial_lowpass: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Low-pass filter of that start, such as 60; with --halves, of theirs.",
            show_default="none, --halves a sixth of the mask's diameter",
            rich_help_panel=START_PANEL,
        ),
    ] = None

    method: Annotated[
        Literal["faml", "fa"],
        typer.Option(
            help="faml: every particle in several poses and classes, weighted by probability. "
            "fa: its best pose and class only (the baseline).",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = "faml"
    preset: Annotated[
        Literal["default", "paper"],
        typer.Option(
            help="default: what works best here. paper: the choices of the publication.", rich_help_panel=METHOD_PANEL
        ),
    ] = "default"
    sampler: Annotated[
        Literal["magnitude", "joint"] | None,
        typer.Option(
            help="joint: all rotations and shifts together, phases kept. magnitude: the paper's best matches of the "
            "Fourier magnitudes; faster, finds less in noise.",
            show_default="joint, paper magnitude",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    update: Annotated[
        Literal["explore", "ratio", "wiener", "printed"] | None,
        typer.Option(
            help="How averages are made. ratio: divided by their coverage. wiener: besides, noise held down, and no "
            "orientation favoured because of the missing wedge. explore: wiener, with more held down at first, ever "
            "less as detail grows. printed: the paper's Eq. 10.",
            show_default="explore, paper printed",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    starts: Annotated[
        int,
        typer.Option(
            help="Random starts to begin with; the one with the highest likelihood after a quarter of the iterations "
            "goes on. Not with --use-poses or --reference.",
            rich_help_panel=START_PANEL,
        ),
    ] = 1
    iterations: Annotated[
        int, typer.Option(help="Most iterations; stops earlier once nothing changes.", rich_help_panel=METHOD_PANEL)
    ] = 20
    mask_radius: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Radius of the soft spherical mask: the particle and a little more.",
            show_default="0.8 of half the box",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    resolution: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Finest detail used for alignment.",
            show_default="full band",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    band: Annotated[
        Literal["evidence", "growing", "full"] | None,
        typer.Option(
            help="How that detail is come to. growing: over the first 60 % of the iterations. evidence: as soon and as "
            "far as two halves of the particles agree on more, and back. full: all from the start.",
            show_default="growing, from a map or poses evidence, paper full",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    max_shift: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="How far a particle may lie off the centre of its box.",
            show_default="an eighth of the box",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    symmetry: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Point group of the structure, imposed on the averages: Cn and Dn about z (a two-fold of Dn along x); "
            "T, O, I1 and I2 with RELION's axes.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = "C1"
    helix: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="Å DEGREES",
            help="Rise and twist per subunit of a filament along z of the average, imposed from the middle of the box. "
            "Start from poses or from a map that lies so.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    candidates: Annotated[
        int, typer.Option(help="Most poses tried per particle and class.", rich_help_panel=METHOD_PANEL)
    ] = 50
    bandwidth: Annotated[
        int | None,
        typer.Option(
            help="Degree of the spherical harmonics: angular detail of the pose search.",
            show_default="by resolution and mask, at most 36",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    regularization: Annotated[
        float | None,
        typer.Option(
            help="How much the classes are pulled together in the first iterations, against one class taking all "
            "particles. 0 leaves them alone.",
            show_default="1, paper 0",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    noise_groups: Annotated[
        Literal["auto", "none", "optics", "tomogram"] | None,
        typer.Option(
            help="Which particles share a noise curve: those of an optics group or of a tomogram. auto: optics groups, "
            "if there are several with 20 particles or more, with --scale-correction or --no-normalize.",
            show_default="auto, paper none",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    folds: Annotated[
        int | None,
        typer.Option(
            help="Compare each particle with averages of the others: of so many folds of the particles all but its "
            "own. 1: with averages it is part of.",
            show_default="10, paper and fa 1",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    reseed: Annotated[
        bool | None,
        typer.Option(
            "--reseed/--no-reseed",
            help="Begin a class that has become empty anew, from the particles the others explain worst.",
            show_default="reseed, paper no-reseed",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    scale_correction: Annotated[
        bool,
        typer.Option(
            "--scale-correction",
            help="Let the strength of the signal differ between particles, as it does where their noise did before it "
            "was brought to one level.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = False
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            help="Gold standard: all particles first, with detail to --initial-lowpass; from there two halves of each "
            "class, each by itself. Their Fourier shell correlation tells the resolution.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = False
    fsc_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="MAP",
            help="With --halves: soft mask (.mrc, 0 to 1) inside which they are compared, lying as the averages do. "
            "May be another one with --resume.",
            show_default="the sphere of --mask-radius",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    b_factor: Annotated[
        float | None,
        typer.Option(
            metavar="Å²",
            help="With --halves: sharpen postprocess.mrc, amplitudes times exp(-B / 4d²) at resolution d as in RELION, "
            "such as -300. A positive one blurs. May be another one with --resume.",
            show_default="not sharpened",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None
    padding: Annotated[
        int,
        typer.Option(
            help="Zero padding when maps are rotated: 3 is more accurate, slower and larger than 2.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = 2

    seed: Annotated[
        int, typer.Option(help="Same seed, same result. Another one: another random start.", rich_help_panel=RUN_PANEL)
    ] = 0
    device: Annotated[
        str,
        typer.Option(help="auto (a GPU that works, else the CPU), cpu, cuda or cuda:1 ...", rich_help_panel=RUN_PANEL),
    ] = "auto"
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="all cores", rich_help_panel=RUN_PANEL)
    ] = None
    log_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also append lines of JSON, one at the start, for each iteration and at the end, for programs.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="At the end tell the seconds of each step, and what of them the machine's own copy and matrix product "
            "would have taken.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML",
            help="File with options, as in tilt_range = [-60, 60]; particles (the INPUT) and classes too. Those given "
            "here as well win. Every run leaves such a file, run.toml.",
            callback=_from_config,
            rich_help_panel=RUN_PANEL,
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check input and options, tell how much time, memory and disk the run will take, and write nothing.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False
    recenter: Annotated[
        bool,
        typer.Option(
            "--recenter",
            help="Also write run_data_recentered.star: coordinates in the tomogram moved by what was found, origins 0, "
            "to extract boxes from anew.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the output folder (same input and options; more --iterations allowed).",
            callback=_resumed,
            rich_help_panel=RUN_PANEL,
        ),
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the run in the output folder; files that no run wrote stay.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False


INPUT_ARGUMENT = typer.Argument(
    metavar="INPUT",
    help="RELION STAR file of 3-D subtomograms, Dynamo table (.tbl), folder of .mrc or .em boxes, quoted pattern "
    "such as 'boxes/*.mrc', or a stack of boxes in one file (.mrc, .mrcs, .npy).",
    show_default=False,
)


def _with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Shared` in place of its `**options`: typer reads the signature."""
    hints = get_type_hints(Shared, include_extras=True)
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(Shared, option.name, inspect.Parameter.empty),
            annotation=hints[option.name],
        )
        for option in fields(Shared)
    ]
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _version(value: bool) -> None:
    if value:
        typer.echo(f"faml-gpu {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
@_with_shared_options
def average(particles: Annotated[str, INPUT_ARGUMENT], **options: Any) -> None:
    """Average subtomograms of one structure in unknown poses."""
    _run(particles, 1, options)


@app.command()
@_with_shared_options
def classify(
    particles: Annotated[str, INPUT_ARGUMENT],
    n_classes: Annotated[int, typer.Option("--classes", "-k", metavar="K", help="Number of classes.")],
    **options: Any,
) -> None:
    """Sort subtomograms into K classes and average each."""
    _run(particles, n_classes, options)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("faml_demo"),
    seed: Annotated[int, typer.Option(help="Of the simulated data and the random start.")] = 0,
    device: Annotated[
        str, typer.Option(help="auto (a GPU that works, else the CPU), cpu, cuda or cuda:1 ...")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in the folder.")] = False,
) -> None:
    """Simulate two structures, tell them apart and average them; downloads nothing, takes about two minutes."""
    with _ending(Resume(None)):
        from faml_gpu.demo import DEMO, run_demo

        with Display(DEMO.iterations) as display:
            run_demo(
                output,
                seed=seed,
                device=device,
                threads=threads,
                overwrite=overwrite,
                say=display.say,
                on_iteration=display.iteration,
            )


@app.command()
def evaluate(
    found: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN | MAP...",
            help="Output folder of a run, or one or more maps (.mrc).",
            show_default=False,
        ),
    ],
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="STAR",
            help="STAR file with the true angles, origins and class numbers of the run's particles, as far as known; "
            "found by their rlnImageName (path or file name).",
        ),
    ] = None,
    truth_map: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MAP",
            help="True map of class 1; again for class 2, 3 ... Or any reference map. "
            "Same box and voxel size as the averages, protein bright.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for evaluation.json and evaluation_fsc.png.", show_default="beside the maps"
        ),
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Radius of the structure: maps are compared inside this sphere.",
            show_default="found from each truth map",
        ),
    ] = None,
    lowpass: Annotated[
        list[float] | None,
        typer.Option(metavar="Å", help="Also correlate maps low-passed to this; repeatable.", show_default="20 and 30"),
    ] = None,
    point_group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Symmetry of the true structure, for the pose errors: Cn and Dn about z (a two-fold of Dn along x); "
            "T, O, I1 and I2 with RELION's axes. Once, or once for each class.",
            show_default="C1",
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(help="Random pairs of aligned particles for the signal-to-noise ratio; 0: none.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of the random pairs.")] = 0,
    symmetry_order: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Symmetry score: mean correlation of the average with itself turned by 360°/N, 2·360°/N ...",
        ),
    ] = None,
    symmetry_axis: Annotated[
        Literal["x", "y", "z", "principal"],
        typer.Option(
            help="Axis of the symmetry score, in the truth map (or in the average, without one); principal: the axis "
            "the structure is long or flat along."
        ),
    ] = "principal",
    iteration: Annotated[
        int | None, typer.Option(help="Iteration of the run to evaluate.", show_default="the final result")
    ] = None,
    voxel_size: Annotated[
        float | None, typer.Option(metavar="Å", help="Voxel size, if the maps do not say it.")
    ] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Also write each average moved onto its truth map.")
    ] = False,
) -> None:
    """Compare a finished run, or maps, with the truth or with reference maps.

    Averages are turned and moved onto the truth map, as they are and mirrored.

    Tells how well classes, angles, origins and maps agree, and the signal-to-noise ratio.
    """
    with _ending(Resume(None, "nothing was changed")):
        from faml_gpu.evaluation import FILTERS, evaluate, make_folder, print_tables, write_evaluation

        status = Console(stderr=True)
        if output is not None:
            make_folder(output)
        with status.status("reading") as shown:
            result = evaluate(
                found,
                truth=truth,
                truth_maps=truth_map or [],
                radius=radius,
                filters=lowpass or FILTERS,
                point_group=point_group or ["C1"],
                symmetry_order=symmetry_order,
                symmetry_axis=symmetry_axis,
                pairs=pairs,
                seed=seed,
                iteration=iteration,
                voxel_size=voxel_size,
                progress=shown.update,
            )
        print_tables(result, Console(highlight=False))
        beside = found[0] if found[0].is_dir() else found[0].parent
        written = write_evaluation(result, output or beside, save_maps=save_maps)
        typer.echo(f"wrote {', '.join(map(str, written))}")


RUN_ARGUMENT = typer.Argument(metavar="RUN", help="Output folder of a run.", show_default=False)
ITERATION_OPTION = typer.Option(
    help="Iteration of the run to show.", show_default="the final result, or the last there is"
)


@app.command()
def report(
    run: Annotated[Path, RUN_ARGUMENT],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file.", show_default="report.html in the folder")
    ] = None,
    iteration: Annotated[int | None, ITERATION_OPTION] = None,
) -> None:
    """Tell what a run did and found, as one HTML file; also of a run that is still going on.

    A run that ends has made its report.
    """
    with _ending(Resume(None, "nothing was changed")):
        from faml_gpu.report import write_report
        from faml_gpu.run_folder import writing

        with writing(output or run):
            written = write_report(run, iteration, output)
        typer.echo(f"wrote {written}")


@app.command()
def view(run: Annotated[Path, RUN_ARGUMENT], iteration: Annotated[int | None, ITERATION_OPTION] = None) -> None:
    """Write slices and projections of the averages as a PNG, and a script that opens them in ChimeraX.

    With each class comes a BILD file for ChimeraX that shows from where its particles were seen.
    """
    with _ending(Resume(None, "nothing was changed")):
        from faml_gpu.report import write_views
        from faml_gpu.run_folder import writing

        with writing(run):
            written = write_views(run, iteration)
        typer.echo(f"wrote {', '.join(map(str, written))}")


@app.command()
def simulate(
    structures: Annotated[
        list[str],
        typer.Argument(
            metavar="STRUCTURE...",
            help="Each one a class: a PDB or mmCIF file, an MRC map (protein bright), or a built-in shape: groel, "
            "groel-es, proteasome, ribosome, tmv, tric.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for boxes, STAR files and true maps.", show_default=False)
    ],
    count: Annotated[
        list[int] | None,
        typer.Option(
            "--count",
            "-n",
            help="Boxes of each structure: once for all, or once for each in their order.",
            show_default="100",
            rich_help_panel=PARTICLES_PANEL,
        ),
    ] = None,
    box: Annotated[int, typer.Option(help="Box size, voxels.", rich_help_panel=PARTICLES_PANEL)] = 64,
    voxel_size: Annotated[float, typer.Option(metavar="Å", help="Voxel size.", rich_help_panel=PARTICLES_PANEL)] = 6.0,
    resolution: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Low-pass filter of the structures.",
            show_default="3 voxels",
            rich_help_panel=PARTICLES_PANEL,
        ),
    ] = None,
    snr: Annotated[
        float,
        typer.Option(
            help="Signal-to-noise ratio of the boxes: variance of noise-free boxes over that of boxes of noise alone. "
            "inf leaves the noise out.",
            rich_help_panel=PARTICLES_PANEL,
        ),
    ] = 0.01,
    max_shift: Annotated[
        float | None,
        typer.Option(
            metavar="Å",
            help="Particles lie off the centre of their box by up to this along each axis.",
            show_default="2 voxels",
            rich_help_panel=PARTICLES_PANEL,
        ),
    ] = None,
    about_axis: Annotated[
        Literal["x", "y", "z"] | None,
        typer.Option(
            help="Preferred orientation: all particles have their principal axis along this axis and are turned about "
            "it only.",
            show_default="any orientation",
            rich_help_panel=PARTICLES_PANEL,
        ),
    ] = None,
    assembly: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Biological assembly of PDB and mmCIF files; none: the atoms as they are.",
            show_default="the first",
            rich_help_panel=PARTICLES_PANEL,
        ),
    ] = None,
    tilt_range: Annotated[
        tuple[float, float],
        typer.Option(metavar="LO HI", help="Lowest and highest tilt, degrees.", rich_help_panel=IMAGING_PANEL),
    ] = (-60.0, 60.0),
    tilt_step: Annotated[float, typer.Option(help="Degrees between images.", rich_help_panel=IMAGING_PANEL)] = 3.0,
    tilt_axis: Annotated[
        Literal["x", "y"],
        typer.Option(help="Axis of the boxes that the stage tilts about.", rich_help_panel=IMAGING_PANEL),
    ] = "y",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="No images: noise is added to the structure itself, and the missing wedge is cut out. No CTF, no MTF.",
            rich_help_panel=IMAGING_PANEL,
        ),
    ] = False,
    ctf: Annotated[
        bool, typer.Option("--ctf/--no-ctf", help="Contrast transfer of the microscope.", rich_help_panel=IMAGING_PANEL)
    ] = True,
    mtf: Annotated[
        bool, typer.Option("--mtf/--no-mtf", help="Blur of the detector.", rich_help_panel=IMAGING_PANEL)
    ] = True,
    defocus: Annotated[
        float, typer.Option(metavar="µm", help="Underfocus is positive.", rich_help_panel=IMAGING_PANEL)
    ] = 6.0,
    voltage: Annotated[
        float, typer.Option(metavar="kV", help="Of the microscope.", rich_help_panel=IMAGING_PANEL)
    ] = 300.0,
    cs: Annotated[float, typer.Option(metavar="mm", help="Spherical aberration.", rich_help_panel=IMAGING_PANEL)] = 2.7,
    amplitude_contrast: Annotated[float, typer.Option(help="Share, 0 to 1.", rich_help_panel=IMAGING_PANEL)] = 0.07,
    wiener: Annotated[
        float,
        typer.Option(
            help="Noise-to-signal ratio that the CTF correction assumes: larger is smoother.",
            rich_help_panel=IMAGING_PANEL,
        ),
    ] = 0.1,
    float16: Annotated[
        bool,
        typer.Option(
            "--float16",
            help="Write boxes as float16 (MRC mode 12): half the space, and half as much to a GPU.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same particles.", rich_help_panel=RUN_PANEL)] = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu, or a GPU as cuda or cuda:0.", rich_help_panel=RUN_PANEL)
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="all cores", rich_help_panel=RUN_PANEL)
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the simulation in the folder; files that no simulation wrote stay.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
) -> None:
    """Simulate subtomograms with known truth: structures, tilt series, reconstructed boxes."""
    given = dict(locals())
    with _ending(Resume(None)):
        from faml_gpu.simulate import SimulationOptions, simulate_data_set

        options = SimulationOptions(**{field.name: given[field.name] for field in fields(SimulationOptions)})
        with Display(0) as display:
            result = simulate_data_set(
                structures,
                count or [100],
                output,
                options,
                device=device,
                threads=threads,
                overwrite=overwrite,
                progress=display.step,
                say=display.say,
            )
        typer.echo(f"wrote {len(result.classes)} boxes: {result.star}, with the truth in {result.truth_star}")


@app.command()
def fsc(
    first: Annotated[Path, typer.Argument(metavar="A", help="Half map (.mrc).", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other one, lying on the first.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for postprocess.mrc (with a mask postprocess_masked.mrc too), postprocess.star, "
            "postprocess_fsc.json and postprocess_fsc.png.",
            show_default=False,
        ),
    ],
    mask: Annotated[
        Path | None, typer.Option(metavar="MAP", help="Soft mask (.mrc, 0 to 1) around the structure.")
    ] = None,
    radius: Annotated[
        float | None, typer.Option(metavar="Å", help="A soft sphere about the box centre instead of a mask.")
    ] = None,
    b_factor: Annotated[
        float | None,
        typer.Option(
            metavar="Å²",
            help="Sharpen postprocess.mrc: amplitudes times exp(-B / 4d²) at resolution d, as in RELION, such as -300. "
            "A positive one blurs.",
            show_default="not sharpened",
        ),
    ] = None,
    voxel_size: Annotated[
        float | None, typer.Option(metavar="Å", help="Voxel size, if the maps do not say it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random phases.")] = 0,
) -> None:
    """Fourier shell correlation of two maps, corrected for what a mask adds, and their mean weighted by it.

    Where the curve falls below 0.5 and 0.143; of several crossings the first, coarsest one counts.
    """
    with _ending(Resume(None)):
        from faml_gpu.half_files import compare_files, write_comparison

        comparison = compare_files(
            first, second, mask=mask, radius=radius, voxel_size=voxel_size, b_factor=b_factor, seed=seed
        )
        typer.echo("\n".join(comparison.lines()))
        typer.echo(f"wrote {', '.join(map(str, write_comparison(comparison, output)))}")


@app.command()
def info() -> None:
    """Versions, processor, memory, and the state of CUDA on this machine."""
    from faml_gpu.device_info import choose_device, cuda_info, machine, versions

    device, reason = choose_device("auto")
    lines = versions() | machine() | cuda_info()
    lines |= {"device": f"{device} ({reason})", "kernels": _compile_kernels(device)}
    for name, value in lines.items():
        typer.echo(f"{name:<12} {value}")


def _compile_kernels(device: str) -> str:
    if device == "cpu":
        return "not compiled: no GPU"
    from faml_gpu import kernels
    from faml_gpu.array_backend import use_device

    start = time.monotonic()
    try:
        with use_device(device):
            compiled = kernels.compile_all()
    except Exception as error:  # the compiler's message, or whatever else: to be seen, with all the rest of `info`
        return f"do not compile: {type(error).__name__}: {error}"
    names = {kernel["kernel"] for kernel in compiled}
    return f"{len(names)}, in float and double, compiled in {time.monotonic() - start:.1f} s"


def main() -> None:
    """Entry point of the console script."""
    app()


def _run(particles: str, n_classes: int, options: dict[str, Any]) -> None:
    output: Path = options["output"]
    options.pop("config")  # its values are among the others
    log, profile = options.pop("log_json"), options.pop("profile")
    if options.pop("dry_run"):
        _dry_run(particles, n_classes, options)
        return
    with _ending(Resume(output)) as stopping:
        # Here and not at the top: these take a second or two, which --help need not wait for.
        from faml_gpu.device_info import choose_device, n_threads
        from faml_gpu.half_files import half_line
        from faml_gpu.halves import HalvesResult
        from faml_gpu.pipeline import classify

        device, reason = choose_device(options["device"])
        typer.echo(f"faml-gpu {__version__}: {device} ({reason}), {n_threads(options['threads'])} threads")
        shown = Display(options["iterations"], log, parts=options["halves"])
        with shown as display, _profiled(profile, device, options["threads"]):
            result = classify(
                particles,
                n_classes,
                progress=display.step,
                on_iteration=display.iteration,
                stopping=stopping,
                **options,
            )
        if result.converged_at is not None:
            typer.echo(f"converged at iteration {result.converged_at}")
        if isinstance(result, HalvesResult):
            for k, found in enumerate(result.halves, start=1):
                if found is not None:
                    typer.echo(f"class {k}: {half_line(found)}")
        names = [f"run_class{k:03d}.mrc" for k in range(1, len(result.maps) + 1)]
        typer.echo(
            f"wrote {output / names[0]}{' ... ' + names[-1] if len(names) > 1 else ''} and {output / 'run_data.star'}; "
            f"to read: {output / 'report.html'}"
        )


@contextmanager
def _profiled(wanted: bool, device: str, threads: int | None) -> Iterator[None]:
    """What is done inside, step by step, on the screen at the end, if that is wanted."""
    if not wanted:
        yield
        return
    import numpy as np

    from faml_gpu.array_backend import namespace as module_of
    from faml_gpu.array_backend import synchronize, to_device, use_device
    from faml_gpu.profile import Machine, profiling
    from faml_gpu.threads import cpu_threads

    def wait() -> None:
        synchronize(device)

    with profiling(wait) as profile:
        yield
    with cpu_threads(threads), use_device(device):
        machine = Machine.measured(module_of(to_device(np.zeros(1), device)), wait)
    for line in profile.table(machine):
        typer.echo(line)


def _dry_run(particles: str, n_classes: int, options: dict[str, Any]) -> None:
    with _ending(Resume(None, "nothing was written")):
        from faml_gpu.device_info import choose_device, n_threads
        from faml_gpu.dry_run import free_disk, host_memory
        from faml_gpu.pipeline import dry_run

        device, reason = choose_device(options["device"])
        typer.echo(f"faml-gpu {__version__}: {device} ({reason}), {n_threads(options['threads'])} threads")
        with Display(0) as display:
            found = dry_run(particles, n_classes, progress=display.step, **options)
        took, values = found.forecast, found.resolved
        of_others = "all read" if found.looked_into == found.particles else f"{found.looked_into} read, all headers"
        coarsest = found.box * found.voxel_size / values["r_start"]
        finest = f"{'at most ' if values['choices']['band'] == 'evidence' else ''}{values['resolution']:.1f}"
        lines = {
            "input": f"{found.particles} boxes of {found.box} voxels of {found.voxel_size:g} Å ({of_others})",
            "plan": f"{'1 class' if n_classes == 1 else f'{n_classes} classes'}, "
            f"at most {values['iterations']} iterations, detail from {coarsest:.0f} to {finest} Å, "
            f"mask of {values['mask_radius']:.0f} Å, shifts to {values['max_shift']:.0f} Å, "
            f"{took.batch} particles at a time",
            "time": f"{_seconds(took.first)} for an iteration at the coarsest, {_seconds(took.full)} at all detail: "
            f"{_seconds(took.total)} in all, less if it converges ({took.measured} particles timed)",
            "memory": f"{_gigabytes(took.host)} of {_gigabytes(host_memory())}"
            + (f", {_gigabytes(took.device)} on {device}" if took.device is not None else ""),
            "disk": f"{_gigabytes(took.disk)} of {_gigabytes(free_disk(options['output']))} free",
        }
        for name, text in lines.items():
            typer.echo(f"{name:<8} {text}")
        if took.host > host_memory():
            typer.echo("warning: that is more memory than there is: smaller boxes, or fewer --folds", err=True)
        if took.disk > free_disk(options["output"]):
            typer.echo("warning: that is more disk than is free", err=True)
        typer.echo("nothing was written")


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GB"


@dataclass
class Step:
    """A step of a run, by what was told of it; `first` of `total` were done when it began."""

    name: str
    first: int
    total: int
    done: int
    started: float
    at: float

    @property
    def seconds(self) -> float:
        return self.at - self.started

    def left(self) -> float | None:
        """Seconds, at the mean pace so far; None before anything is done."""
        if self.done <= self.first:
            return None
        return self.seconds / (self.done - self.first) * (self.total - self.done)

    def part(self) -> tuple[str, int] | None:
        """Of a step that is an iteration: the part of the run it belongs to ("" if it has none), and its number."""
        part, found, number = self.name.rpartition("iteration ")
        return (part.removesuffix(", "), int(number)) if found and number.isdecimal() else None


class Display:
    """Progress: bars on a terminal, in a log one plain line a step or iteration.

    Parameters
    ----------
    iterations : of the run, or of each of its parts
    log : file for lines of JSON
    parts : the run has several, of which each has the time that is left of it
    """

    def __init__(self, iterations: int, log: Path | None = None, *, parts: bool = False) -> None:
        self._iterations = iterations
        self._parts = parts
        self._log = log
        self._log_begun = False
        self._console = Console(highlight=False)
        self._bars: Bars | None = None
        self._step: Step | None = None
        self._first: IterationRecord | None = None  # of the part of the run
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._tell("start", version=__version__, command=sys.argv)
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.table import Column

            self._bars = Progress(
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                # Not rich's own: that forgets all that is older than half a minute.
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                console=self._console,
            )
            self._whole = self._bars.add_task(
                "iterations", total=self._iterations, visible=self._iterations > 0, left=""
            )
            self._part = self._bars.add_task("preparing", total=1, left="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_step()
        if self._bars is not None:
            self._bars.stop()
        ends = {KeyboardInterrupt: "interrupted", _Terminated: "terminated"}
        status = "finished" if kind is None else next((end for what, end in ends.items() if kind is what), "failed")
        self._tell("end", status=status, message=str(error) if status == "failed" else "")

    def step(self, name: str, done: int, total: int) -> None:
        """Within an iteration: `done` of `total` of the step `name`."""
        now = time.monotonic()
        if self._step is None or name != self._step.name or done < self._step.done:
            self._end_step()
            self._step, self._told = Step(name, done, total, done, now, now), now
            if self._bars is not None:
                self._bars.reset(self._part, total=max(total, 1), description=name, left="")
                if (part := self._step.part()) is not None:
                    self._bars.update(self._whole, description=part[0] or "iterations", completed=part[1] - 1)
                    if part[1] == 1:
                        self._bars.update(self._whole, left="")
        self._step.done, self._step.total, self._step.at = done, total, now
        left = self._step.left()
        if self._bars is not None:
            told = "" if left is None else f"left {_seconds(left)}"
            self._bars.update(self._part, completed=done, total=max(total, 1), left=told)
        if left is not None and done < total and now - self._told >= TOLD_EVERY:
            self._tell_step(self._step, left)
            if self._bars is None:
                self.say(f"{name}: {done} of {total}, left {_seconds(left)}")
            self._told = now

    def _end_step(self, *, told: bool = False) -> None:
        """The step that went on is over; `told`: a line tells of it."""
        step, self._step = self._step, None
        if step is not None:
            self._tell_step(step, 0.0)
            if self._bars is None and not told and step.seconds >= TOLD_FROM:
                self.say(f"{step.name}: {step.done} in {_seconds(step.seconds)}")

    def _tell_step(self, step: Step, left: float) -> None:
        facts = {"step": step.name, "done": step.done, "total": step.total}
        self._tell("step", **facts, seconds=round(step.seconds, 1), seconds_left=round(left, 1))

    def iteration(self, record: IterationRecord) -> None:
        """After an iteration."""
        now = time.monotonic()
        self._end_step(told=True)
        if self._first is None or self._first.iteration >= record.iteration:
            self._first = record
        seconds = 0.0 if record.converged else sum(record.seconds.values()) * (self._iterations - record.iteration)
        left = "" if seconds == 0 else self._left(record, seconds)
        line = _iteration_line(record, self._iterations, now - self._started) + (left and f"  {left}")
        if left and self._parts:
            line += f" of {record.part or 'this part'}"
        self._tell("iteration", of=self._iterations, **asdict(record), seconds_left=round(seconds, 1))
        self._started = now
        self.say(line)
        if self._bars is not None:
            description = record.part or "iterations"
            self._bars.update(self._whole, completed=record.iteration, description=description, left=left)

    def _left(self, record: IterationRecord, seconds: float) -> str:
        """What is left if the others take as long as this one: while the band grows they take longer."""
        limit = "about"
        if record.iteration >= GROWING * self._iterations:
            limit = "at most"  # it may converge
        elif self._first is not None and record.r_max > self._first.r_max:
            limit = "more than"
        return f"left {limit} {_seconds(seconds)}"

    def _tell(self, event: str, **facts: Any) -> None:
        """A line of JSON for programs that watch the run; it is in the file as soon as it has happened.

        If that fails before the run has begun, it does not begin. Later it goes on without.
        """
        if self._log is None:
            return
        from faml_gpu.run_folder import finite

        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        text = json.dumps(finite(line), allow_nan=False) + "\n"
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)  # it may be the run's folder
            with self._log.open("ab+") as file:
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    text = "\n" + text  # the line before was cut off
                file.write(text.encode())
        except OSError as error:
            what = f"option log-json: {self._log} cannot be written ({error.strerror})"
            if not self._log_begun:
                raise InputError(what) from None
            self._log = None
            warnings.warn(f"{what}; the run goes on without", stacklevel=2)
        self._log_begun = True

    def say(self, line: str) -> None:
        """A line of text, above the bars if there are any."""
        if self._bars is None:
            typer.echo(line)
            sys.stdout.flush()  # a log file shows it now, not at the end
        else:
            self._bars.console.print(line, soft_wrap=True)


def _iteration_line(record: IterationRecord, iterations: int, seconds: float) -> str:
    width = len(str(iterations))
    part = f"{record.part}  " if record.part else ""
    return (
        f"{part}{record.iteration:>{width}}/{iterations}  L {record.log_likelihood:.6e}  sigma {record.sigma:.4g}  "
        f"resolution {record.resolution:.1f} Å  classes {' '.join(map(str, record.class_sizes))}  "
        f"changed {100 * record.changed_class:.1f} %  poses {record.pose_change:.1f}°  {seconds:.1f} s"
        + "".join(f"  class {k + 1} was empty: begun anew" for k in record.reseeded)
    )


class Resume:
    """How to go on after an interruption: the command as given, with --resume."""

    def __init__(self, output: Path | None, otherwise: str = "start again with --overwrite") -> None:
        self._output = output
        self._otherwise = otherwise

    def hint(self) -> str:
        """What to print."""
        if self._output is None:
            return self._otherwise
        try:
            begun = any(any(self._output.glob(f"run_*{end}.json")) for end in ("checkpoint", "unfinished"))
        except OSError:
            begun = False
        if not begun:
            return "no iteration was completed: nothing to go on from"
        words = [word for word in sys.argv[1:] if word != "--overwrite"]
        if "--resume" not in words:
            words.append("--resume")
        return f"go on with: {shlex.join(['faml-gpu', *words])}"


class _Terminated(BaseException):
    """SIGTERM, as an exception: files in the making are cleared away, the lock is released."""


def _note(text: str) -> None:
    """A line on stderr while a run goes on: not by `typer.echo`, which bars would be drawn over."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _ending(resume: Resume) -> Iterator[Stopping]:
    """Turn the ways a run can end early into one message on stderr and an exit status.

    The first Ctrl-C or SIGTERM waits, for a batch at most, where what a run has done so far can be kept (`Stopping`).
    """
    stopping = Stopping()

    def ask(number: int, frame: FrameType | None) -> None:
        stopping.ask(KeyboardInterrupt() if number == signal.SIGINT else _Terminated())
        # It waits. In a thread, since the signal may have come while the other was writing to the same stream.
        text = "stopping after this batch; the same again stops at once"
        threading.Thread(target=_note, args=(text,), daemon=True).start()

    def tell(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        _note(f"warning: {message}")

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background shells have it ignored
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)  # what we have to say to the user is one of these
            warnings.showwarning = tell
            yield stopping
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("; ".join(filter(None, ("interrupted", stopping.kept, resume.hint()))), err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    except _Terminated:
        typer.echo("; ".join(filter(None, ("terminated", stopping.kept, resume.hint()))), err=True)
        raise typer.Exit(128 + signal.SIGTERM) from None
    except Exception as error:
        from faml_gpu.run_folder import OutputError

        if isinstance(error, OSError):  # a file system says no where no more can be said of it
            place = f"{error.filename}: " if error.filename else ""
            typer.echo(f"error: {place}{error.strerror or error}\n{resume.hint()}", err=True)
        elif isinstance(error, OutputError):
            typer.echo(f"error: {error}\n{resume.hint()}", err=True)
        else:
            raise
        raise typer.Exit(2) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
