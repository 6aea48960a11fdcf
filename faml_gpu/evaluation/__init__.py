"""A finished run, or maps, against the truth or a reference: what `faml-gpu evaluate` does."""

from faml_gpu.evaluation.compare import FILTERS, evaluate
from faml_gpu.evaluation.report import make_folder, print_tables, tables, write_evaluation
from faml_gpu.evaluation.results import Evaluation

__all__ = ["FILTERS", "Evaluation", "evaluate", "make_folder", "print_tables", "tables", "write_evaluation"]
