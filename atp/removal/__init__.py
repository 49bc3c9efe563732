"""The physical cut of removed structures and its certificate."""

from atp.removal.certify import (
    LogitGap,
    compare,
    logit_gap,
    reference_logits,
    reload_gap,
)
from atp.removal.cut import cut_config, cut_model, cut_state_dict, merge_adapter

__all__ = [
    "LogitGap",
    "compare",
    "cut_config",
    "cut_model",
    "cut_state_dict",
    "logit_gap",
    "merge_adapter",
    "reference_logits",
    "reload_gap",
]
