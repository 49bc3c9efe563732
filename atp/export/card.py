"""The model card that goes with an exported model."""

from __future__ import annotations

from atp.config import ATPConfig
from atp.report.markup import code

_USAGE = """```python
import atp  # registers the per-layer model class
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The licence of the source model and of the data applies to this model too.
"""


def model_card(config: ATPConfig, params_before: int, params_after: int) -> str:
    """README.md of model/: where it comes from, what was removed, how to load it. Counts are of all parameters."""
    source = config.model.path if not config.model.gguf_file else config.model.gguf_file
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [atp, structural-pruning, lora]
---
# A smaller model, tuned and pruned in one stage

Made by ATP (All-in-One Tuning and Structural Pruning, arXiv 2412.14426) from {code(source)}.

* Parameters: {params_after:,} of {params_before:,}; target share of decoder parameters {config.decisions.target_keep}.
* Mask space `{config.decisions.space}`; layers have widths of their own, listed in `config.json`.
* Data recipe: {code(config.data.recipe)}.

{_USAGE}"""


def baseline_card(config: ATPConfig, method: str, params_before: int, params_after: int) -> str:
    """README.md of model/ for a system that ATP is compared with. Counts are of all parameters."""
    source = config.model.path if not config.model.gguf_file else config.model.gguf_file
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [structural-pruning, lora]
---
# A model to compare with: {method}

Made by the baseline `{method}` of the package atp-kernels from {code(source)}, then tuned with LoRA.

* Parameters: {params_after:,} of {params_before:,}; target share of decoder parameters {config.decisions.target_keep}.
* Data recipe: {code(config.data.recipe)}.

{_USAGE}"""
