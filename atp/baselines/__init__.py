"""The systems to compare with: their names, without torch."""

BASELINE_NAMES = (
    *("dense_lora", "random", "magnitude", "static", "llm_pruner", "llm_pruner_second", "llm_pruner_mixed"),
    *("wanda_sp", "slicegpt", "disp_llm", "llm_pruner+refit", "wanda_sp+refit"),
)
"""The keys of `atp.baselines.methods.BASELINES`; `dense_lora` removes nothing, and `+refit` adds ATP's refit."""
