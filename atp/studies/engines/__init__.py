"""Where the members of a comparison, an experiment or a sweep run: here, in processes of this machine, on a cluster."""

from atp.studies.engines.choice import choose
from atp.studies.engines.engine import Engine, Here, Job, Say, carry_out

__all__ = ["Engine", "Here", "Job", "Say", "carry_out", "choose"]
