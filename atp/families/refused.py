"""Why well-known model families are refused. Families that are neither here nor registered are unknown."""

_MULTIMODAL = "it wraps a language model with encoders of other media, so give the language model alone, as a folder"
_GEMMA3 = f"{_MULTIMODAL} of model_type gemma3_text"
_FUSED = "its projections are fused (query_key_value), so one linear would belong to several structures"
_SHARED = "its layers share keys and values and have inputs of their own, so a cut of one layer reaches others"
_RECURRENT = "layers of it keep a recurrent state (linear attention, Mamba, convolution), which no mask space describes"
_LATENT = "its keys and values come from one latent vector, so its heads have no rows of their own there"
_CHUNKED = "its MLPs are experts in one tensor and its attention sees chunks of a text, which no mask space describes"
_BESIDE = "its attention and its MLP read one norm and run beside each other, which no refit follows"
_EXPERTS = "its experts differ from those of Mixtral and Qwen3-MoE"

REASONS: dict[str, str] = {
    name: reason
    for reason, names in {
        _GEMMA3: ("gemma3",),
        _MULTIMODAL: ("emu3", "fuyu", "git", "got_ocr2", "mllama", "phi4_multimodal"),
        _SHARED: ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        _RECURRENT: (
            "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
            "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
            "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
        ),
        _LATENT: (
            "axk1", "axk2", "deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3",
            "youtu",
        ),
        _CHUNKED: ("llama4", "llama4_text"),
        _FUSED: ("gpt_neox", "persimmon", "falcon"),
        _BESIDE: ("phi",),
        _EXPERTS: ("qwen2_moe", "granitemoe", "phimoe", "deepseek_v3"),
    }.items()
    for name in names
}  # fmt: skip
"""`model_type` -> the reason, as the end of a sentence: "... is not supported because <reason>"."""
