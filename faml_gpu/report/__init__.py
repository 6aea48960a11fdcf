"""Results to look at: the HTML report of a run, pictures, ChimeraX scripts, FSC curves."""

from faml_gpu.report.html import write_report
from faml_gpu.report.slices import montage
from faml_gpu.report.views import write_views

__all__ = ["montage", "write_report", "write_views"]
