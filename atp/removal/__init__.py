"""The physical cut of removed structures and its certificate."""

from atp.removal.certify import (
    LogitGap,
    certify_export,
    check_certificate,
    compare,
    logit_gap,
    merge_error,
    reference_logits,
)
from atp.removal.cut import base_of, cut_config, cut_model, cut_state_dict, merge_adapter

__all__ = [
    "LogitGap",
    "base_of",
    "certify_export",
    "check_certificate",
    "compare",
    "cut_config",
    "cut_model",
    "cut_state_dict",
    "logit_gap",
    "merge_adapter",
    "merge_error",
    "reference_logits",
]
