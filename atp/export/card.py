"""The model card that goes with an exported model."""

from __future__ import annotations

from atp.config import ATPConfig
from atp.report.markup import code

_USAGE = """Its layers differ in width, so transformers needs the class that package `atp-kernels` registers. Without it
loading fails with "model type `atp_llama` ... Transformers does not recognize this architecture", and upgrading
transformers does not help.

```python
import atp  # registers the per-layer model class
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Start a tool that loads the folder itself after `import atp`; lm-eval, for example:

```sh
python -c "import atp, lm_eval.__main__ as tool; tool.cli_evaluate()" --model hf \\
    --model_args pretrained=path/to/this/folder --tasks arc_easy
```

The licence of the source model and of the data applies to this model too.
"""


def model_card(config: ATPConfig, params_before: int, params_after: int) -> str:
    """README.md of model/: where it comes from, what was removed, how to load it. Counts are of all parameters."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [atp, structural-pruning, lora]
---
# A smaller model, tuned and pruned in one stage

Made by ATP (All-in-One Tuning and Structural Pruning, arXiv 2412.14426) from {_origin(config)}.

* Parameters: {params_after:,} of {params_before:,}; target share of decoder parameters {config.decisions.target_keep}.
* Mask space `{config.decisions.space}`; layers have widths of their own, listed in `config.json`.
* Data recipe: {code(config.data.recipe)}.

{_USAGE}"""


def base_card(config: ATPConfig) -> str:
    """README.md of base/: the smaller model that an adapter belongs to."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# The base of an adapter

{_origin(config)} with removed structures cut out, before the tuning in `../adapter` is added to its weights. With that
adapter it is the model in `../model`; alone it is worse than either.

The licence of the source model applies to this model too.
"""


def adapter_card(config: ATPConfig) -> str:
    """README.md of adapter/: which model it belongs to, and how to load both."""
    return f"""---
library_name: peft
pipeline_tag: text-generation
tags: [atp, structural-pruning, lora]
---
# A LoRA adapter for a cut model

LoRA with rank {config.lora.r} and alpha {config.lora.alpha:g} for `../base`, which is {_origin(config)} with removed
structures cut out. It fits no other model: the uncut one has other shapes, and `../model` has this adapter merged in
already, so it would count twice there.

```python
import atp  # registers the per-layer model class
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("path/to/this/run/base")
model = PeftModel.from_pretrained(base, "path/to/this/run/adapter")
```

The licence of the source model and of the data applies to this adapter too.
"""


def baseline_card(config: ATPConfig, method: str, params_before: int, params_after: int) -> str:
    """README.md of model/ for a system that ATP is compared with. Counts are of all parameters."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [structural-pruning, lora]
---
# A model to compare with: {method}

Made by the baseline `{method}` of the package atp-kernels from {_origin(config)}, then tuned with LoRA.

* Parameters: {params_after:,} of {params_before:,}; target share of decoder parameters {config.decisions.target_keep}.
* Data recipe: {code(config.data.recipe)}.

{_USAGE}"""


def _origin(config: ATPConfig) -> str:
    return code(config.model.gguf_file or config.model.path)
