"""Step 1 of FAML: candidate poses by rotational matching in spherical harmonics, then their shifts."""

from faml_gpu.fast_alignment import harmonics, joint, wigner
from faml_gpu.fast_alignment.align import (
    UNSEEN_BANDWIDTH,
    Candidates,
    Observation,
    Reference,
    UnseenGain,
    align,
    make_reference,
    margin,
    match,
    screen_band,
    single_best,
    unseen_gain,
    unseen_harmonics,
    weight_harmonics,
)
from faml_gpu.fast_alignment.joint import integrate, make_tables
from faml_gpu.fast_alignment.marginal import JointReference, make_joint_reference
from faml_gpu.fast_alignment.refine import carry_over, refine
from faml_gpu.fast_alignment.translations import ShiftWindow, shift_window

__all__ = [
    "UNSEEN_BANDWIDTH",
    "Candidates",
    "JointReference",
    "Observation",
    "Reference",
    "ShiftWindow",
    "UnseenGain",
    "align",
    "carry_over",
    "forget_tables",
    "integrate",
    "make_joint_reference",
    "make_reference",
    "make_tables",
    "margin",
    "match",
    "refine",
    "screen_band",
    "shift_window",
    "single_best",
    "unseen_gain",
    "unseen_harmonics",
    "weight_harmonics",
]


def forget_tables() -> None:
    """Let go of the tables kept for later calls, where memory is short."""
    harmonics.forget_tables()
    joint.forget_tables()
    wigner.folded_d_table.cache_clear()
    wigner.small_d_table.cache_clear()
