"""Why well-known model families are refused. Families that are neither here nor registered are unknown."""

_MULTIMODAL = (
    "it wraps a language model together with an image encoder, so give the language model alone, as a folder of "
    "model_type gemma3_text"
)
_FUSED = "its projections are fused (such as gate_up_proj), so one linear would belong to several structures"
_UNGATED = "its MLPs have no gate, so a channel is not what the spaces remove"
_EXPERTS = "its MLPs are experts behind a router, which no mask space describes"

REASONS: dict[str, str] = {
    name: reason
    for reason, names in {
        _MULTIMODAL: ("gemma3",),
        _FUSED: ("phi3", "glm4"),
        _UNGATED: ("arcee",),
        _EXPERTS: ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3"),
    }.items()
    for name in names
}
"""`model_type` -> the reason, as the end of a sentence: "... is not supported because <reason>"."""
