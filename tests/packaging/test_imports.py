"""Imports go one way (DESIGN section 5), and everything imported is declared."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "faml_gpu"

# A module may import from its own rank or a lower one; __init__ hands out names lazily and is left out.
RANKS = [
    {"errors", "profile"},
    {"options", "config", "data", "array_backend", "threads", "device_info", "stopping"},
    {"kernels"},
    {"geometry", "fourier", "weights", "masks", "ops", "fsc", "symmetry", "resolution"},
    {"metrics"},
    {"expectation", "maximization", "voronoi", "fast_alignment", "simulate", "io"},
    {"posteriors", "unfinished", "uncertainty", "noise", "reading", "run_reader"},
    {"report"},
    {"plan"},
    {"symmetry_axes"},
    {"starting", "history"},
    {"reseeding"},
    {"faml"},
    {"halves"},
    {"dry_run", "run_folder"},
    {"half_files"},
    {"pipeline", "evaluation"},
    {"demo"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}

# Modules whose distribution has another name, or that come only with an extra.
EXTRAS = {"cupy": "cupy-cuda12x", "cupyx": "cupy-cuda12x"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


def component(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def own_imports(module: str) -> set[str]:
    return {name for name in imported(MODULES[module]) if name.split(".")[0] == "faml_gpu" and name != "faml_gpu"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "faml_gpu"])
def test_imports_go_down(module: str) -> None:
    here = component(module)
    assert here in RANK, f"{module}: give it a place in RANKS"
    for name in own_imports(module):
        there = component(name)
        assert RANK[there] <= RANK[here], f"{module} imports {name}, which is above it"
        if here == "ops":
            assert there not in {"io", "data", "options"}, f"{module} imports {name}: ops knows no files or options"


def test_no_cycles() -> None:
    graph = {module: own_imports(module) for module in MODULES if module != "faml_gpu"}
    while graph:
        leaves = [module for module, names in graph.items() if not (names & graph.keys()) - {module}]
        assert leaves, f"import cycle among {sorted(graph)}"
        for module in leaves:
            del graph[module]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> tuple[set[str], set[str]]:
    """Distributions of the core dependencies, and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {normal(re.match(r"[A-Za-z0-9._-]+", text)[0]) for text in requirements}  # type: ignore[index]

    return names(project["dependencies"]), set().union(*map(names, project["optional-dependencies"].values()))


def third_party(folder: Path) -> dict[str, set[str]]:
    """Distributions imported below a folder, with the files that do."""
    homes = importlib.metadata.packages_distributions()
    # Scripts of bench/ import their neighbours by name, and so do their tests.
    own = [*folder.rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    local = {"faml_gpu", "tests", "bench", *(path.stem for path in own)}
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in local:
                continue
            home = EXTRAS.get(top) or homes.get(top, [top])[0]
            found.setdefault(normal(home), set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_package_imports_are_core_dependencies() -> None:
    core, extras = declared()
    for name, files in third_party(PACKAGE).items():
        allowed = extras if name.startswith("cupy") else core
        assert name in allowed, f"{name}, imported in {sorted(files)}, is not declared in pyproject.toml"


@pytest.mark.parametrize("folder", ["tests", "bench"])
def test_other_imports_are_declared(folder: str) -> None:
    core, extras = declared()
    for name, files in third_party(ROOT / folder).items():
        assert name in core | extras, f"{name}, imported in {sorted(files)}, is not declared in pyproject.toml"


def test_core_dependencies_are_used() -> None:
    core, _ = declared()
    assert core <= third_party(PACKAGE).keys() | third_party(ROOT / "tests").keys()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, faml_gpu.cli\n"
        "print(*sorted({'numpy', 'scipy', 'numba', 'matplotlib', 'pyshtools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_public_names() -> None:
    import faml_gpu

    for name in faml_gpu.__all__:
        assert getattr(faml_gpu, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'classfy'"):
        faml_gpu.classfy  # noqa: B018
