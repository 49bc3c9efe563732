"""`atp experiment`: one question as a file, its runs, and their results as CSV, JSON and PNG."""

from typing import TYPE_CHECKING

from atp.ground.lazy import lazily

if TYPE_CHECKING:
    from atp.studies.experiments.experiment import Experiment
    from atp.studies.experiments.spec import ExperimentSpec

__all__ = ["Experiment", "ExperimentSpec"]
__getattr__ = lazily(__name__, experiment="Experiment", spec="ExperimentSpec")
