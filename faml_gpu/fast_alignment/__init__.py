"""Step 1 of FAML: candidate poses by rotational matching in spherical harmonics, then their shifts."""

from faml_gpu.fast_alignment.align import (
    Candidates,
    Observation,
    Reference,
    align,
    make_reference,
    margin,
    single_best,
)
from faml_gpu.fast_alignment.harmonics import forget_tables
from faml_gpu.fast_alignment.refine import carry_over, refine
from faml_gpu.fast_alignment.translations import ShiftWindow, shift_window

__all__ = [
    "Candidates",
    "Observation",
    "Reference",
    "ShiftWindow",
    "align",
    "carry_over",
    "forget_tables",
    "make_reference",
    "margin",
    "refine",
    "shift_window",
    "single_best",
]
