"""Pictures of results."""

from faml_gpu.report.slices import montage

__all__ = ["montage"]
