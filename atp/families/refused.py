"""Why well-known model families are refused. Families that are neither here nor registered are unknown."""

_POST_NORM = "its RMSNorms follow the blocks, so a block's output is not what its last linear writes"
_CAPPED = f"{_POST_NORM}, and it caps its logits softly, which the loss leaves out"
_NORM_OVER_HEADS = f"it takes one RMSNorm over all heads, which changes when heads go, and {_POST_NORM}"
_FUSED = "its projections are fused (qkv_proj, gate_up_proj), so one linear would belong to several structures"
_EXPERTS = "its experts differ from those of Mixtral and Qwen3-MoE"

REASONS: dict[str, str] = {
    name: reason
    for reason, names in {
        _CAPPED: ("gemma2",),
        _POST_NORM: ("gemma3", "gemma3_text"),
        _NORM_OVER_HEADS: ("olmo2", "olmo3"),
        _FUSED: ("phi3",),
        _EXPERTS: ("qwen2_moe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3"),
    }.items()
    for name in names
}
"""`model_type` -> the reason, as the end of a sentence: "... is not supported because <reason>"."""
