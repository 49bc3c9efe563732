"""Why well-known model families are refused. Families that are neither here nor registered are unknown."""

_POST_NORM = "its RMSNorms follow the blocks, so a block's output is not what its last linear writes"
_NORM_OVER_HEADS = f"it takes one RMSNorm over all heads, which changes when heads go, and {_POST_NORM}"
_MULTIMODAL = (
    "it wraps a language model together with an image encoder, so give the language model alone, as a folder of "
    "model_type gemma3_text"
)
_FUSED = "its projections are fused (qkv_proj, gate_up_proj), so one linear would belong to several structures"
_EXPERTS = "its MLPs are experts behind a router, which no mask space describes"

REASONS: dict[str, str] = {
    name: reason
    for reason, names in {
        _MULTIMODAL: ("gemma3",),
        _NORM_OVER_HEADS: ("olmo2", "olmo3"),
        _FUSED: ("phi3",),
        _EXPERTS: ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3"),
    }.items()
    for name in names
}
"""`model_type` -> the reason, as the end of a sentence: "... is not supported because <reason>"."""
