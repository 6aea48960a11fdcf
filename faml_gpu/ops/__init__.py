"""The heavy loops: array in, array out. NumPy arrays go to the CPU twin, CuPy arrays to the CUDA twin."""

from faml_gpu.ops.accumulate import accumulate
from faml_gpu.ops.assign import assign
from faml_gpu.ops.correlations import correlations
from faml_gpu.ops.harmonics import harmonics
from faml_gpu.ops.normal_equations import normal_equations
from faml_gpu.ops.peaks import peaks
from faml_gpu.ops.residual import residual
from faml_gpu.ops.rotate import rotate

__all__ = ["accumulate", "assign", "correlations", "harmonics", "normal_equations", "peaks", "residual", "rotate"]
