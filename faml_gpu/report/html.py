"""The report of a run: one HTML file with every figure in it, for a browser without a network."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from faml_gpu import __version__
from faml_gpu.errors import InputError
from faml_gpu.io.atomic import atomic_path
from faml_gpu.options import Options
from faml_gpu.report import figures
from faml_gpu.report.summary import MISFIT, RunSummary, read_summary
from faml_gpu.uncertainty import effective_particles

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"
LISTED = 20  # particles that fit nowhere


@dataclass(frozen=True)
class Plate:
    """A figure of the page: heading, the picture as a data URI, what it shows, and how to read it."""

    name: str
    heading: str
    picture: str
    shows: str
    text: str


def write_report(
    folder: str | os.PathLike[str], iteration: int | None = None, path: str | os.PathLike[str] | None = None
) -> Path:
    """Write what a run did and found as one HTML file.

    Parameters
    ----------
    folder : of the run; one that has not ended is reported up to its last iteration
    iteration : from 1; None is the final result
    path : of the report; None is report.html in the folder, run_it007_report.html of an iteration

    Returns
    -------
    Path
        Of the report; it appears whole or not at all.

    Raises
    ------
    InputError
        No run is there, or a file of it is damaged; `path` is a folder.
    OSError
        It cannot be written.
    """
    if path is not None and (not Path(path).name or Path(path).is_dir()):
        raise InputError(f"output {path}: found a folder, expected the name of a file")
    run = read_summary(folder, iteration)
    if path is None:
        path = Path(folder) / (REPORT if iteration is None else f"{run.files.stem}_{REPORT}")
    path = Path(path)
    environment = Environment(
        loader=PackageLoader("faml_gpu.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["options"] = _options_whole
    text = environment.get_template("report.html").render(
        version=__version__,
        title=run.files.folder.resolve().name,
        run=run,
        facts=list(_facts(run)),
        finest=min(row["resolution"] for part in (run.history, *(h.history for h in run.halves)) for row in part),
        changed=_changed_options(run),
        doubts=run.doubts(),
        classes=[_class_row(run, k) for k in range(len(run.maps))],
        plates=list(_plates(run)),
        misfits=[_misfit_row(run, i) for i in run.misfits[:LISTED]],
        n_misfits=len(run.misfits),
        limit=MISFIT,
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode(errors="replace"))  # names of files need not be UTF-8
    return path


class _Html(str):
    """Text that is HTML by now: templates ask for this method, and escape what has none."""

    def __html__(self) -> str:
        return self


def _options_whole(text: str) -> _Html:
    """Text with names of options as code, which the page keeps on one line: browsers break lines behind a hyphen."""
    return _Html(re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", html.escape(text)))


def _facts(run: RunSummary) -> Iterator[tuple[str, str]]:
    """What was run, on what, for how long."""
    about, data = run.about, run.about["input"]
    if about["command"]:
        program, *words = about["command"]
        yield "Command", shlex.join(["faml-gpu" if program.endswith("faml-gpu") else program, *words])
    yield "Particles", f"{data['particles']} boxes of {data['box']}³ voxels of {data['voxel_size']:g} Å, {data['path']}"
    done = len(run.history)
    if not run.final:
        state = f"{run.iteration} of at most {run.options['iterations']}"
    elif about["status"] == "finished":
        state = f"converged after {about['converged_at']}" if run.converged else f"all {done} done, not converged"
    else:
        state = f"{done} of at most {run.options['iterations']} done"
    yield "Iterations", state
    if about["started"]:
        yield "Started", _moment(about["started"])
    if run.final and about.get("ended"):
        yield "Ended", _moment(about["ended"])
    if run.latest and isinstance(about.get("wall_seconds"), int | float):
        sessions = len(about.get("sessions") or [0])
        gone_on = f", in {sessions} sessions" if sessions > 1 else ""
        so_far = "" if run.final else " so far"
        yield "Time", f"{_duration(about['wall_seconds'])}{so_far}{gone_on}"
    together, apart = _seconds(run.history), sum(_seconds(part.history) for part in run.halves)
    yield (
        "Time in iterations",
        _duration(together + apart) + (f", {_duration(apart)} of it the halves" if apart else ""),
    )
    machine = about["machine"]
    yield "Machine", ", ".join(str(machine[key]) for key in ("cpu", "memory", "system") if machine.get(key))
    yield "Device", f"{about['device']}, {about['threads']} CPU threads"
    versions = about["versions"]
    yield "Versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    yield "Seed", str(about["seed"])


def _moment(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _seconds(records: list[dict[str, Any]]) -> float:
    return float(sum(sum(record["seconds"].values()) for record in records))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _changed_options(run: RunSummary) -> list[tuple[str, str, str]]:
    """Options that are not the default: name, value, default; those of where it ran left out."""
    usual, given = asdict(Options()), run.about["options"]
    return [
        (f"--{name.replace('_', '-')}", _value(value), _value(usual.get(name)))
        for name, value in given.items()
        if value != usual.get(name) and name not in ("n_classes", "seed", "threads", "device")
    ]


def _value(value: Any) -> str:
    if value is None:
        return "automatic"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _class_row(run: RunSummary, k: int) -> dict[str, Any]:
    resolution = next((facts["levels"]["0.143"]["resolution"] for number, facts in run.fsc if number == k + 1), None)
    probability = run.class_probability
    return {
        "name": f"class {k + 1}",
        "file": run.files.maps[k].name,
        "particles": int(run.sizes[k]),
        "share": float(100 * run.sizes[k] / run.sizes.sum()),
        "effective": None if probability is None else float(effective_particles(probability)[k]),
        "views": run.coverage_of_angles(k),
        "fourier": float(run.history[-1]["coverage"][k]),
        "resolution": resolution,
    }


def _misfit_row(run: RunSummary, i: int) -> dict[str, Any]:
    return {
        "row": i + 1,
        "name": run.files.particles.image_names[i],
        "class": int(run.classes[i]) + 1,
        "deviations": float(run.misfit[i]),
        "confidence": float(run.confidence[i]),
    }


def _plates(run: RunSummary) -> Iterator[Plate]:
    several = len(run.maps) > 1
    yield Plate(
        "averages",
        "Class averages" if several else "Average",
        _picture(figures.class_averages(run)),
        "central slices and projections of each average",
        "Left three: the planes through the centre of the map; right three: the map summed along an axis, inside the "
        "mask's sphere. Protein is bright. Streaks or a smear along one direction mean that it was seen from too few "
        "sides; a sharp edge or rings outside of the particle mean noise taken for signal.",
    )
    if several:
        yield Plate(
            "sizes",
            "Class sizes",
            _picture(figures.class_sizes(run)),
            "share of particles in each class by iteration",
            "Sizes that still drift at the end ask for more iterations. One curve that takes all is a collapse. A "
            "dotted line marks where an empty class was begun anew.",
        )
    yield Plate(
        "convergence",
        "Convergence",
        _picture(figures.convergence(run)),
        "likelihood, noise, resolution, shifts, pose changes and Fourier coverage by iteration",
        "All should level off. The log-likelihood jumps where finer detail is taken in (third panel), since there is "
        "more to explain: compare it only where that stands still. The pose change is the median angle by which a "
        "particle turned since the iteration before. Fourier coverage is the share of the average's Fourier voxels "
        "that any particle has measured; what the missing wedges leave in common stays empty.",
    )
    if run.halves:
        yield Plate(
            "halves",
            "Convergence of the halves",
            _picture(figures.halves(run)),
            "likelihood, resolution and pose changes of each half by iteration",
            "The panels above are of all particles together. From their averages the halves of each class then go on "
            "by themselves: here is each of them, the second dashed. All should level off, as above. The "
            "log-likelihood is shown where the resolution is that of the end, and counts from its last value.",
        )
    if run.fsc:
        yield Plate(
            "fsc",
            "Resolution: Fourier shell correlation of two halves",
            _picture(figures.fsc_curves(run)),
            "Fourier shell correlation of the half maps",
            "How well two averages agree that were made from separate halves of the particles. Where a curve falls "
            "below 0.143 is the resolution usually quoted. Within the shaded range both halves began from the same "
            "map: agreement there says nothing.",
        )
    yield Plate(
        "directions",
        "Views",
        _picture(figures.directions(run)),
        "viewing directions of each class on two hemispheres",
        "From where each particle was seen, in the frame of its average: the half of the sphere around +z, and that "
        "around −z; the centre of a disc is the z axis, rings are at 30° and 60° from it. Even is good; a "
        "few clusters or a belt mean a preferred orientation, or orientations locked to the missing wedge. With a "
        "symmetry imposed, each particle shows in one of its equal views only.",
    )
    if run.planes is not None:
        yield Plate(
            "coverage",
            "What was measured",
            _picture(figures.coverage(run)),
            "Fourier coverage of each class in three central planes",
            "Central planes of Fourier space of each average, its centre in the middle, as far as detail was used: "
            "from dark, measured by few particles, to yellow, measured by most. Red was measured by none of them, or "
            "next to none: there the average is empty, and its density smeared along that direction. Red cones about "
            "an axis are what the missing wedges have in common, as when all particles were seen from one side.",
        )
    yield Plate(
        "shifts",
        "Shifts",
        _picture(figures.shifts(run)),
        "how far particles lie off the centre of their boxes",
        "How far each particle was found off the centre of its box. A pile at the line means that more of them lie "
        "beyond what was looked at: raise --max-shift, or centre the particles better.",
    )
    yield Plate(
        "confidence",
        "How sure the poses are",
        _picture(figures.confidence(run)),
        "probability of each particle's best pose, and of its best class",
        "Near 1: one pose (class) explains the particle alone. Low values of the pose are usual: neighbouring "
        "orientations, and the copies of a symmetric particle, share the probability. Low values of the class are "
        "particles that could be either.",
    )
    yield Plate(
        "likelihoods",
        "Particles that fit nowhere",
        _picture(figures.likelihoods(run)),
        "log-likelihood of each particle",
        "How well each particle is explained by its class, against all others. Those left of the line are likely no "
        "such particles: gold, ice, empty or damaged boxes, or another structure.",
    )
    yield Plate(
        "seconds",
        "Where the time went",
        _picture(figures.step_seconds(run)),
        "seconds of each step of the program",
        "All iterations together, those of halves among them.",
    )


def _picture(figure: Figure) -> str:
    """As a data URI; the same figure gives the same text."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "faml_gpu"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
