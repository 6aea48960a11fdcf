"""The demo gives what the README promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from faml_gpu.cli import app


@pytest.mark.rare  # .ci/run runs the same by the README's command, and looks at the same figures
@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "demo")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {words[0]: words[1:] for line in result.output.splitlines() if (words := line.split())}
    f1, *r = map(float, rows["faml"])
    assert f1 == 1.0
    assert len(r) == 2
    assert min(r) >= 0.9
    assert imread(tmp_path / "demo/slices.png").std() > 0.05
    for method in ("faml", "fa"):
        assert {"run_class001.mrc", "run_class002.mrc", "run_data.star"} <= {
            path.name for path in (tmp_path / "demo" / method).iterdir()
        }
