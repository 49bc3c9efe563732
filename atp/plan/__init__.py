"""`atp plan`: what a run will do and cost, before anything is trained and without the model's weights."""

from atp.plan.plan import make_plan

__all__ = ["make_plan"]
