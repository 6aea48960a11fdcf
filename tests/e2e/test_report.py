"""The report of a run and its views: what they say is so, and a browser shows them without a network."""

import base64
import json
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

import faml_gpu
from faml_gpu.cli import app
from faml_gpu.data import Poses
from faml_gpu.errors import InputError
from faml_gpu.geometry import matrix_to_relion, random_rotations, relion_to_matrix
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.report import figures, write_report, write_views
from faml_gpu.report.chimerax import angular_distribution, contour_level, sphere_points
from faml_gpu.report.summary import RunSummary, read_summary
from faml_gpu.simulate import groel, ribosome, simulate_particles

VOXEL, BOX = 16.0, 24
NAMES = ["averages", "sizes", "convergence", "directions", "coverage", "shifts", "confidence", "likelihoods", "seconds"]
OF_HALVES = [*NAMES[:3], "halves", "fsc", *NAMES[3:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = simulate_particles([groel(), ribosome()], [6, 5], box=BOX, voxel_size=VOXEL, snr=0.5, seed=3)
    folder = tmp_path_factory.mktemp("report") / "a <run>"
    particles = ArrayParticles(made.boxes, VOXEL, made.weight)
    faml_gpu.classify(particles, 2, folder, iterations=3, sampler="magnitude", device="cpu", bandwidth=8, folds=2)
    return folder


@pytest.fixture(scope="module")
def with_halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = simulate_particles([groel(), ribosome()], [6, 6], box=16, voxel_size=24.0, snr=0.5, max_shift=1.0, seed=3)
    folder = tmp_path_factory.mktemp("report") / "halves"
    particles = ArrayParticles(made.boxes, 24.0, made.weight)
    options = {"iterations": 2, "sampler": "magnitude", "device": "cpu", "bandwidth": 6, "folds": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever there is to say of six boxes
        faml_gpu.classify(particles, 2, folder, halves=True, **options)
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_leaves_its_report(finished: Path) -> None:
    page = Page(finished / "report.html")
    headings = [about.get("id") for tag, about in page.tags if tag == "h2"]
    assert headings == ["summary", *NAMES, "run"]
    pictures = [about for tag, about in page.tags if tag == "img"]
    assert len(pictures) == len(NAMES)
    for about in pictures:
        kind, _, content = str(about["src"]).partition(",")
        assert kind == "data:image/svg+xml;base64"
        drawn = ElementTree.fromstring(base64.b64decode(content))
        assert drawn.tag.endswith("svg")
        assert about["alt"]
    # Nothing is fetched from anywhere.
    links = [about[key] for _, about in page.tags for key in ("src", "href") if key in about]
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert "http" not in re.sub(r"data:image[^\"]*", "", (finished / "report.html").read_text(encoding="utf-8"))
    targets = {about.get("id") for _, about in page.tags}
    assert {str(link)[1:] for link in links if str(link).startswith("#")} <= targets
    assert "a <run>" in page.text  # escaped
    words = " ".join(page.text.split())
    for told in (
        "11 boxes of 24³ voxels of 16 Å", "--sampler magnitude automatic", "--bandwidth 8 automatic",
        "--folds 2 automatic", "11 particles, 2 classes", "The run was ended by its 3 iterations",
    ):  # fmt: skip
        assert told in words
    assert re.search(
        r"Started \d{4}-\d\d-\d\d [\d:]{8} UTC Ended \d{4}-\d\d-\d\d [\d:]{8} UTC Time (\d+ min )?[\d.]+ s Time in it",
        words,
    )
    assert re.search(r"class 1 \d+ \d+\.\d % \d+\.\d \d\.\d\d \d+\.\d % run_class001.mrc", words)


def test_the_same_run_has_the_same_report(finished: Path, tmp_path: Path) -> None:
    again = write_report(finished, path=tmp_path / "again.html")
    assert again.read_bytes() == (finished / "report.html").read_bytes()


def test_report_and_view_of_a_run_still_going_on(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in folder.iterdir():
        if not re.match(r"run(_it00[12]_.*|\.json)", path.name):
            path.unlink()
    about = json.loads((folder / "run.json").read_text())
    about |= {"status": "running", "iterations": about["iterations"][:2]}
    (folder / "run.json").write_text(json.dumps(about))
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.output == f"wrote {folder / 'report.html'}\n"
    words = " ".join(Page(folder / "report.html").text.split())
    assert "The run has not ended: this is iteration 2 of at most 3." in words
    assert "run_it002: 11 particles" in words
    done = CliRunner().invoke(app, ["view", str(folder), "--iteration", "1"])
    assert done.exit_code == 0, done.output
    made = ["run_it001_classes.png", "run_it001.cxc", *(f"run_it001_class00{k}_angdist.bild" for k in (1, 2))]
    assert {path.name for path in folder.iterdir()} >= set(made)
    assert "open run_it001_class001.mrc id 1\n" in (folder / "run_it001.cxc").read_text()
    # They are of the run: --overwrite takes them with it.
    from faml_gpu.run_folder import _is_ours

    assert all(_is_ours(name) for name in [*made, "report.html", "run_class001_angdist.bild"])
    assert not any(_is_ours(name) for name in ("my_report.html", "report.html.bak", "run_notes.cxc"))


def test_report_of_an_iteration(finished: Path, tmp_path: Path) -> None:
    """What later iterations found is not in it, and the final report stays."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    about = json.loads((folder / "run.json").read_text())
    about["iterations"][2]["coverage"] = [0.123, 0.123]
    for row, finest in zip(about["iterations"], (99.9, 47.3, 31.2), strict=True):
        row["resolution"] = finest
    about["warnings"] = ["something of the end"]
    (folder / "run.json").write_text(json.dumps(about))
    before = (folder / "report.html").read_bytes()
    written = write_report(folder, 2)
    assert written.name == "run_it002_report.html"
    assert (folder / "report.html").read_bytes() == before
    words = " ".join(Page(written).text.split())
    assert "This is iteration 2 of 3, not the result." in words
    assert "Iterations 2 of at most 3" in words
    assert "12.3" not in words
    assert "Alignment used detail to 47.3 Å" in words
    assert "something of the end" not in words
    again = " ".join(Page(write_report(folder)).text.split())
    assert "12.3" in again
    assert "Alignment used detail to 31.2 Å" in again
    assert "something of the end" in again


@pytest.mark.parametrize("status", ["finished", "running"])
def test_warnings_of_an_iteration(status: str, finished: Path, tmp_path: Path) -> None:
    """What run.json has only once the run has ended: one side seen, and all at the largest shift."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    about = json.loads((folder / "run.json").read_text())
    about["iterations"][1]["coverage"] = [0.6, 0.6]
    about |= {"status": status, "iterations": about["iterations"][: 2 if status == "running" else 3]}
    (folder / "run.json").write_text(json.dumps(about))
    table = read_summary(finished, 2).files.particles
    zero, far = np.zeros(table.n_rows), np.full(table.n_rows, 0.99 * about["resolved"]["max_shift"])
    columns = {"rlnAngleTilt": zero, "rlnOriginXAngst": far, "rlnOriginYAngst": zero, "rlnOriginZAngst": zero}
    (folder / "run_it002_data.star").write_text(table.text(columns | {"rlnClassNumber": np.ones(table.n_rows, int)}))
    words = " ".join(Page(write_report(folder, 2 if status == "finished" else None)).text.split())
    assert "class 1 has a preferred orientation: angular coverage 0.00 (even: 1, one direction: 0), 40 % of" in words
    assert "100 % of the particles were found as far off the centre of their box as was looked at" in words
    assert "preferred orientation: angular coverage" not in Page(finished / "report.html").text


def test_report_of_halves(with_halves: Path, tmp_path: Path) -> None:
    """How each half went is in it, while they go on too; in that of an iteration it is not, being later."""

    def parts(folder: Path, iteration: int | None = None) -> tuple[list[str], list[str], str]:
        summary = read_summary(folder, iteration)
        page = Page(write_report(folder, iteration))
        ids = [str(about["id"]) for tag, about in page.tags if tag == "h2"]
        return [part.name for part in summary.halves], ids[1:-1], " ".join(page.text.split())

    folder = tmp_path / "run"
    shutil.copytree(with_halves, folder)
    names, plates, words = parts(folder)
    assert names == [f"class {k}, half {half}" for k in (1, 2) for half in (1, 2)]
    assert plates == OF_HALVES
    assert "These halves were ended by their 2 iterations, before they stood still: class 1, half 1; class" in words
    about = json.loads((folder / "run.json").read_text())
    of_halves = about["iterations_of_halves"]
    seconds = [sum(sum(r["seconds"].values()) for r in part["iterations"]) for part in of_halves]
    assert f"{sum(seconds):.1f} s of it the halves" in words
    everything = sum(seconds) + sum(sum(r["seconds"].values()) for r in about["iterations"])
    widths = [bar.get_width() for bar in figures.step_seconds(read_summary(folder)).axes[0].patches]
    assert sum(widths) == pytest.approx(everything)
    # The run of all particles has no half among its records, and those of the halves are read as they are.
    assert [r["part"] for r in about["iterations"]] == ["", ""]
    assert read_summary(folder).halves[3].history == of_halves[3]["iterations"]
    names, plates, words = parts(folder, 2)
    assert (names, plates) == ([], NAMES)
    assert "of it the halves" not in words
    assert "Ended" not in words
    of_halves[1:] = [{**of_halves[1], "iterations": of_halves[1]["iterations"][:1]}]
    of_halves[0]["iterations"][1]["converged"] = True
    (folder / "run.json").write_text(json.dumps(about))
    assert "before they stood still: class 1, half 2." in parts(folder)[2]
    (folder / "run.json").write_text(json.dumps(about | {"status": "running"}))
    names, plates, words = parts(folder)
    assert names == ["class 1, half 1", "class 1, half 2"]
    assert plates == [name for name in OF_HALVES if name != "fsc"]
    assert re.search(r" Time (\d+ min )?[\d.]+ s so far Time in", words)
    drawn = figures.halves(read_summary(folder)).axes
    assert [line.get_linestyle() for line in drawn[2].lines] == ["-", "--"]
    assert [len(line.get_xdata()) for line in drawn[2].lines] == [2, 1]
    last = [r["r_max"] == of_halves[0]["iterations"][-1]["r_max"] for r in of_halves[0]["iterations"]]
    assert len(drawn[0].lines[0].get_xdata()) == sum(last)
    assert drawn[0].lines[0].get_ydata()[-1] == 0


def test_time_of_a_run_in_several_processes(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    about = json.loads((folder / "run.json").read_text())
    about |= {"wall_seconds": 3725.5, "sessions": [{"started": "", "seconds": 1}] * 3}
    (folder / "run.json").write_text(json.dumps(about))
    assert "Time 1 h 2 min, in 3 sessions Time in iterations" in " ".join(Page(write_report(folder)).text.split())


def test_gaps_are_shown(finished: Path) -> None:
    """A pixel for each voxel of the planes: measured, a gap (red), or beyond the band."""
    run = read_summary(finished)
    assert run.planes is not None
    planes = np.full_like(run.planes, np.nan)
    planes[:, :, 8:17, 8:17] = 0.5
    planes[1, 1, 10, 12] = 0.001
    figure = figures.coverage(replace(run, planes=planes))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [f"class {k}, {plane}" for k in (1, 2) for plane in ("xy", "xz", "yz")]
    for i, ax in enumerate(figure.axes):
        measured, gap = (np.ma.filled(image.get_array(), np.nan) for image in ax.images)
        expected = (i == 4) * 1
        assert np.isfinite(measured).sum() == 81 - expected
        assert np.isfinite(gap).sum() == expected
    assert np.isfinite(np.ma.filled(figure.axes[4].images[1].get_array(), np.nan))[10, 12]
    assert len(figures.coverage(changed(run, poses=replace(run.poses, classes=0 * run.classes))).axes) == 3


def test_report_of_a_run_gone_on_with(finished: Path, tmp_path: Path) -> None:
    """Until it ends again the final files are those of the shorter run."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"status": "running"}))
    assert read_summary(folder).files.stem == "run_it003"
    assert write_views(folder)[0].name == "run_it003_classes.png"


@pytest.mark.parametrize("where", [".", "", "made"])
def test_report_into_a_folder(where: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    done = CliRunner().invoke(app, ["report", str(finished), "-o", where])
    assert done.exit_code == 2
    assert "found a folder, expected the name of a file" in done.stderr


def test_a_report_that_cannot_be_made_does_not_lose_the_result(
    small_star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faml_gpu.report.write_report", Mock(side_effect=RuntimeError("no fonts")))
    options = {"tilt_range": (-60, 60), "iterations": 1, "mask_radius": 120, "bandwidth": 6, "candidates": 4}
    with pytest.warns(UserWarning, match="no report or views were made.*no fonts.*faml-gpu report"):
        result = faml_gpu.average(small_star, tmp_path / "out", **options)
    assert (tmp_path / "out" / "run_class001.mrc").exists()
    assert len(result.history) == 1


@pytest.mark.parametrize("command", ["report", "view"])
def test_what_is_no_run(command: str, tmp_path: Path, finished: Path) -> None:
    def refused(folder: Path, *more: str) -> str:
        done = CliRunner().invoke(app, [command, str(folder), *more])
        assert done.exit_code == 2
        return done.stderr

    assert "no run.json, expected the folder of a faml-gpu run" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "no run_it009_class001.mrc" in refused(finished, "--iteration", "9")
    (tmp_path / "run.json").write_text("{")
    assert "run.json: cannot be read" in refused(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    assert "run.json: found list" in refused(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    about = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps({**about, "iterations": []}))
    assert "found no iteration in run.json" in refused(broken)
    del about["resolved"]
    (broken / "run.json").write_text(json.dumps(about))
    assert "run.json: found nothing of resolved," in refused(broken)
    about = json.loads((finished / "run.json").read_text())
    record = {name: value for name, value in about["iterations"][1].items() if name != "r_max"}
    for change, named in (
        ({"command": "x"}, "command"),
        ({"input": {"path": "p"}}, "input.particles, input.box, input.voxel_size"),
        ({"iterations": [about["iterations"][0], record, 3]}, r"iterations[2].r_max, iterations[3].iteration, iterat"),
    ):
        (broken / "run.json").write_text(json.dumps(about | change))
        assert f"run.json: found nothing of {named}" in refused(broken)
    for odd, named in (
        (3, "iterations_of_halves"),
        ([3], "iterations_of_halves[1].class, iterations_of_halves[1].half, iterations_of_halves[1].iterations"),
        ([{"class": 1, "half": 2, "iterations": []}], "iterations_of_halves[1].iterations,"),
        ([{"class": 1, "half": 2, "iterations": [record]}], "iterations_of_halves[1].iterations[1].r_max,"),
    ):
        (broken / "run.json").write_text(json.dumps(about | {"iterations_of_halves": odd}))
        assert f"run.json: found nothing of {named}" in refused(broken)
    (broken / "run.json").write_text(json.dumps(about))
    planes = (broken / "run_coverage.npz").read_bytes()
    for content, told in (
        (b"", "cannot be read"),
        (planes[:-30], "cannot be read"),
        (b"PK" + planes[:100], "cannot be read"),
        ((tmp_path / "run.json").read_bytes(), "cannot be read"),
    ):
        (broken / "run_coverage.npz").write_bytes(content)
        assert f"run_coverage.npz: {told}" in refused(broken)
    np.savez(broken / "run_coverage.npz", planes=np.zeros((1, 3, 4, 4)))
    assert "run_coverage.npz: found an array of shape (1, 3, 4, 4), expected (2, 3, N, N)" in refused(broken)
    (broken / "run_coverage.npz").write_bytes(planes)
    (broken / "postprocess_fsc.json").write_text("{")
    assert "postprocess_fsc.json: cannot be read" in refused(broken)
    (broken / "postprocess_fsc.json").unlink()
    table = (broken / "run_data.star").read_text()
    (broken / "run_data.star").write_text(table.replace("rlnMaxValueProbDistribution", "rlnOther"))
    assert "run_data.star: no column rlnMaxValueProbDistribution" in refused(broken)


def test_a_report_that_cannot_be_written(finished: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(finished), "-o", str(tmp_path / "no" / "report.html")])
    assert done.exit_code == 2
    assert "cannot write" in done.stderr


def changed(run: RunSummary, *, about: dict | None = None, last: dict | None = None, **fields) -> RunSummary:
    """A converged run without doubts, but for what is said."""
    record = {**run.history[-1], **(last or {})}
    start = {"use_poses": False, "reference": None, "initial_lowpass": None}
    content = {**run.about, "warnings": [], "converged_at": 3, "start": start, "iterations": [record], **(about or {})}
    n = len(run.classes)
    even = Poses(run.poses.rotations, np.zeros((n, 3)), np.arange(n) % 2)
    upright = np.tile(np.eye(3), (len(fields.get("poses", even).rotations), 1, 1))
    usual = {"poses": even, "frames": upright, "log_likelihood": -np.linspace(1, 2, n)}
    return replace(run, files=replace(run.files, about=content), **{**usual, **fields})


def test_doubts(finished: Path) -> None:
    run = read_summary(finished)
    n = len(run.classes)
    assert changed(run).doubts() == []

    def only(**fields) -> str:
        (told,) = changed(run, **fields).doubts()
        return told

    def poses(classes, shift: float = 0.0) -> Poses:
        return Poses(run.poses.rotations, np.full((n, 3), shift), np.asarray(classes))

    assert only(about={"warnings": ["as the run said"]}) == "as the run said"
    last = {**run.history[-1], "map_correlation": [0.99999, 0.99812]}
    assert only(about={"converged_at": None, "iterations": [last]}).endswith(
        "before by 0.9981. --resume with more --iterations goes on."
    )
    before = {**run.history[-1], "log_likelihood": -10.0}
    after = {**before, "log_likelihood": -7.5, "pose_change": 1.24, "changed_class": 0.1, "map_correlation": [1, 0.97]}
    assert only(about={"converged_at": None, "iterations": [before, after]}).startswith(
        "The run was ended by its 3 iterations, before it stood still: in the last one particles turned by 1.2° "
        "(median), 10 % changed class, averages correlated with those before by 0.9700, and the log-likelihood rose by "
        "2.5."
    )
    assert "has not ended" in only(about={"status": "running"})
    assert "Class 2 has taken 100 %" in only(poses=poses(np.ones(n, int)))
    turned = random_rotations(300, np.random.default_rng(3))
    many = Poses(turned, np.zeros((300, 3)), np.r_[np.zeros(280, int), np.ones(20, int)])
    big = {"log_likelihood": -np.linspace(1, 2, 300), "maps": np.concatenate([run.maps, run.maps[:1]])}
    assert only(poses=many, **big) == "Class 3 has only 0 of 300 particles."
    upright = random_rotations(n, np.random.default_rng(1))
    upright[:6] = relion_to_matrix([0, 9, 0])
    locked = replace(poses(np.arange(n) % 2), rotations=upright)
    assert "55 % of the orientations lie within" in only(poses=locked)
    known = {"start": {"use_poses": True, "reference": None, "initial_lowpass": None}}
    assert changed(run, about=known, poses=locked).doubts() == []
    # In the tomogram, which has the wedge: not in boxes that were cut in turned frames.
    frames = random_rotations(n, np.random.default_rng(2))
    assert changed(run, poses=locked, frames=frames).doubts() == []
    along = replace(locked, rotations=np.swapaxes(frames, 1, 2))
    assert changed(run, poses=along).doubts() == []
    assert "100 % of the orientations lie within" in only(poses=along, frames=frames)
    edge = (BOX / 2 - run.options["mask_radius"] / VOXEL) / np.sqrt(3)  # along each axis
    assert changed(run, poses=poses(np.arange(n) % 2, 0.99 * edge)).doubts() == []
    assert "box is tight" in only(poses=poses(np.arange(n) % 2, 1.01 * edge))


def test_particles_that_fit_nowhere(finished: Path, tmp_path: Path) -> None:
    run = read_summary(finished)
    normal = np.random.default_rng(1).standard_normal(len(run.classes))
    normal[[2, 7]] = -30, -90
    odd = changed(run, log_likelihood=1e5 + 12 * normal)
    assert odd.misfits.tolist() == [7, 2]
    (told,) = odd.doubts()
    assert told.startswith("2 of 11 particles fit nowhere")
    assert changed(run, log_likelihood=np.zeros(len(run.classes))).misfits.size == 0  # nothing differs
    many = np.random.default_rng(2).standard_normal(10**5)
    assert changed(run, log_likelihood=3 * many).misfit.std() == pytest.approx(1, abs=0.01)


def test_contour_level() -> None:
    """The two groups of Otsu's criterion, searched for among all levels; and what is meant by it."""
    rng = np.random.default_rng(4)
    volume = rng.normal(0, 0.1, (20, 20, 20)).astype(np.float32)
    volume[8:13, 8:13, 8:13] += 1
    volume[0] = 50  # outside of the sphere
    inside = ((np.indices(volume.shape) - 10) ** 2).sum(axis=0) <= 64
    found = contour_level(volume, 8.0)
    assert 0.3 < found < 0.7  # where the gap between the two is empty, all levels are as good
    values = volume[inside].astype(float)

    def spread_within(level: float) -> float:
        low, high = values[values < level], values[values >= level]
        return len(low) * low.var() + len(high) * high.var()

    best = min(spread_within(level) for level in np.linspace(values.min() + 0.01, values.max() - 0.01, 400))
    assert spread_within(found) == pytest.approx(best, rel=1e-3)


def test_cylinders_stand_where_particles_were_seen_from(finished: Path) -> None:
    """RELION's angles: seen from (sin tilt cos rot, sin tilt sin rot, cos tilt) of the average."""
    run = read_summary(finished)
    angles = np.array([[30.0, 70.0, 11.0]] * 8 + [[200.0, 140.0, 80.0]] * 2 + [[0.0, 0.0, 0.0]])
    poses = Poses(relion_to_matrix(angles), np.zeros((11, 3)), np.r_[np.zeros(10, int), 1])
    text = angular_distribution(changed(run, poses=poses), 0)
    cylinders = np.array([line.split()[1:] for line in text.splitlines() if line.startswith(".cylinder")], float)
    assert len(cylinders) == 2
    inner, outer = cylinders[:, :3] - BOX / 2 * VOXEL, cylinders[:, 3:6] - BOX / 2 * VOXEL
    length = np.linalg.norm(outer - inner, axis=1)
    (many,), (few,) = np.nonzero(length == length.max())[0][None], np.nonzero(length == length.min())[0][None]
    assert length[many] == pytest.approx(4 * length[few], rel=1e-3)
    rot, tilt = np.deg2rad([[30.0, 200.0], [70.0, 140.0]])
    expected = np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], axis=1)
    found = outer[[int(many[0]), int(few[0])]]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_array_less(np.rad2deg(np.arccos((found * expected).sum(axis=1))), 8.0)  # half a bin
    assert (np.linalg.norm(inner, axis=1) > run.options["mask_radius"]).all()


def test_directions_of_boxes_cut_in_turned_frames(finished: Path, tmp_path: Path) -> None:
    """They are those of the particles in their tomograms: table, discs and cylinders."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    table = read_summary(finished).files.particles
    n = table.n_rows
    frames = matrix_to_relion(random_rotations(n, np.random.default_rng(1)))
    columns = {f"rlnTomoSubtomogram{name}": frames[:, i] for i, name in enumerate(("Rot", "Tilt", "Psi"))}
    columns |= {"rlnAngleTilt": np.zeros(n), "rlnClassNumber": np.ones(n, int)}  # all upright in their boxes
    (folder / "run_data.star").write_text(table.text(columns))
    run = read_summary(folder)
    rot, tilt = np.deg2rad(frames[:, :2].T)
    beam = np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], axis=1)  # in the box
    expected = np.einsum("nji,nj->ni", run.poses.rotations, beam)
    np.testing.assert_allclose(run.directions, expected, atol=1e-5)
    assert run.coverage_of_angles(0) > 0.5
    assert angular_distribution(run, 0).count(".cylinder") > 8
    assert angular_distribution(replace(run, frames=np.tile(np.eye(3), (n, 1, 1))), 0).count(".cylinder") == 1


def test_the_bins_of_the_sphere_are_even() -> None:
    points = sphere_points(500)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    rng = np.random.default_rng(0).standard_normal((200_000, 3))
    counts = np.bincount((rng @ points.T).argmax(axis=1), minlength=500)
    assert counts.min() / 400 > 0.8
    assert counts.max() / 400 < 1.2


def test_views_of_maps_with_nothing_in_them(finished: Path, tmp_path: Path) -> None:
    """An empty class, and one that is 0 throughout, are shown all the same."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    write_mrc(folder / "run_class002.mrc", np.zeros((BOX,) * 3), VOXEL)
    text = (folder / "run_data.star").read_text()
    table = read_summary(finished).files.particles
    (folder / "run_data.star").write_text(table.text({"rlnClassNumber": [1] * table.n_rows}))
    assert (folder / "run_data.star").read_text() != text
    write_report(folder)
    names = {path.name for path in write_views(folder)}
    assert names == {"run_classes.png", "run.cxc", "run_class001_angdist.bild"}


def test_a_table_that_does_not_fit_the_maps(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "run_class002.mrc").unlink()
    with pytest.raises(InputError, match="expected an rlnClassNumber from 1 to 1"):
        write_report(folder)


@pytest.mark.parametrize("kind", ["finished", "with_halves"])
def test_in_a_browser(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """No error, every figure drawn, nothing asked for from outside."""
    folder: Path = request.getfixturevalue(kind)
    found = in_a_browser((folder / "report.html").read_text(encoding="utf-8"), tmp_path)
    plates = OF_HALVES if kind == "with_halves" else NAMES
    assert found["data-drawn"] == " ".join(["truetrue"] * len(plates))
    assert found["data-errors"] == ""
    assert found["data-asked"] == ""
    assert found["data-wide"] == "false"


def test_what_a_browser_would_find(tmp_path: Path) -> None:
    """What the test above rests on: it can tell."""
    page = "<head></head><body><p style='width: 2000px'>wide</p><img src='data:image/svg+xml,broken'>{}</body>"
    spoilt = "<script>console.error('told'); console.assert(false, 'so'); Promise.reject('late'); thrown()</script>"
    found = in_a_browser(page.format(spoilt + "<img src='http://localhost:9/x.png'>"), tmp_path)
    assert found["data-drawn"] == "truefalse truefalse"
    assert found["data-wide"] == "true"
    assert found["data-asked"] == "http://localhost:9/x.png"
    for told in ("told", "so", "late", "thrown is not defined", "x.png"):
        assert told in str(found["data-errors"])


def in_a_browser(text: str, tmp_path: Path) -> dict[str, str | None]:
    """What a page in a headless browser has drawn, asked for and complained of, as attributes of its root."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium: the report is not opened in a browser")
    first = (
        "<head><script>{ const told = document.documentElement.dataset; told.errors = '';"
        "const tell = what => { told.errors += `${what}; ` };"
        "addEventListener('error', e => tell(e.message || e.target.outerHTML), true);"
        "addEventListener('unhandledrejection', e => tell(e.reason));"
        "for (const name of ['error', 'warn']) console[name] = (...what) => tell(what.join(' '));"
        "console.assert = (holds, ...what) => { if (!holds) tell(what.join(' ')) }; }</script>"
    )
    script = (
        "<script>addEventListener('load', () => { const told = document.documentElement.dataset;"
        "told.drawn = [...document.images].map(i => `${i.complete}${i.naturalWidth > 100}`).join(' ');"
        "told.asked = performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
        ".join(' '); told.wide = document.documentElement.scrollWidth > innerWidth; });</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", first).replace("</body>", script), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1000,800", "--virtual-time-budget=5000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (root,) = [about for tag, about in parsed(done.stdout) if tag == "html"]
    return root


def parsed(text: str) -> list[tuple[str, dict[str, str | None]]]:
    page = Page.__new__(Page)
    HTMLParser.__init__(page)
    page.tags, page.text = [], ""
    page.feed(text)
    return page.tags


def test_maps_are_those_of_the_run(finished: Path) -> None:
    run = read_summary(finished, 2)
    np.testing.assert_array_equal(run.maps[1], read_mrc(finished / "run_it002_class002.mrc")[0])
    assert run.class_probability is None
    np.testing.assert_allclose(run.off_centre, np.linalg.norm(run.poses.shifts, axis=1) * VOXEL)
