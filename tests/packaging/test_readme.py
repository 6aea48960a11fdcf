"""What the README says can be done can be: its commands have these options, its example comes out as it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from faml_gpu.cli import app
from faml_gpu.geometry import relion_to_matrix

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS: Any = typer.main.get_command(app)


def shown() -> list[str]:
    """Every faml-gpu command of a bash block, or alone in a line's code span."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    text = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    lines = [line.split("#")[0] for line in text.splitlines() if not line.startswith("#")]
    found = [line[match.start() :] for line in lines if (match := re.search(r"faml-gpu ", line))]
    return sorted({*found, *re.findall(r"`(faml-gpu [^`]+)`", README)})


@pytest.mark.parametrize("line", shown())
def test_command(line: str) -> None:
    words = shlex.split(line)[1:]
    command = COMMANDS if words[0].startswith("-") else COMMANDS.commands[words[0]]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"-h", "--help"}
    asked = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert asked <= known, f"{line}: no {', '.join(sorted(asked - known))}"


def test_every_option_is_explained() -> None:
    """In the table, or where inputs are explained."""
    names = {name for parameter in COMMANDS.commands["classify"].params for name in parameter.opts if "--" in name}
    missing = {name for name in names if not re.search(rf"{name}\b", README)}
    assert missing <= {"--classes", "--normalize", "--reseed"}  # -k; the others by their opposites


def test_conventions_example() -> None:
    match = re.search(r"<!-- example: conventions -->\n```python\n(.*?)```", README, re.DOTALL)
    assert match
    found: dict[str, Any] = {}
    exec(match[1], found)
    np.testing.assert_allclose(found["R"], relion_to_matrix([30, 40, 50]), atol=1e-12)
    printed = re.findall(r"^#\s+\[\[?([^\]]+)\]", match[1], re.MULTILINE)
    np.testing.assert_allclose(found["R"], [[float(x) for x in row.split()] for row in printed], atol=5e-4)

    def said(name: str) -> list[float]:
        line = next(line for line in match[1].splitlines() if line.startswith(f"{name} ="))
        numbers = re.search(r"[\[(]([^\])]+)[\])]", line.split("#")[1])
        assert numbers
        return [float(x) for x in numbers[1].split(",")]

    np.testing.assert_allclose(found["t"], said("t"))
    np.testing.assert_allclose(found["p"], said("p"), atol=5e-3)
    np.testing.assert_allclose([found["z"], found["y"], found["x"]], said("z, y, x"), atol=5e-3)
    away = re.search(r"That is ([\d.]+), ([\d.]+) and ([\d.]+) Å", match[1])
    assert away
    np.testing.assert_allclose(np.abs(6 * found["p"]), [float(x) for x in away.groups()], atol=0.05)
