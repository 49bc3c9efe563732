"""`atp experiment`: one question as a file, its runs, and their results as CSV, JSON and PNG."""

from atp.experiments.experiment import Experiment
from atp.experiments.spec import ExperimentSpec

__all__ = ["Experiment", "ExperimentSpec"]
