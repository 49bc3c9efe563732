"""A tokenizer of bytes with the special tokens of ChatML, conversations, and chat templates of several habits."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "<|im_end|>", "<|im_start|>")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Third."},
]
_HEAD = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = _HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + _ASK
MARKED = (
    _HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + _ASK
)
# The last turn gets an empty line of thought, which earlier turns lose.
FORGETFUL = _HEAD + "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}" + CHATML[len(_HEAD) :]
# What it adds at the end depends on all messages, and turns are not written as they are.
OPAQUE = "{{ messages | length }}{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}"
TOOLS = (
    "{% if tools %}tools: {{ tools | map(attribute='name') | join(',') }}\n{% endif %}"
    + _HEAD
    + "{{ m.content or '' }}"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}CALL {{ c.function.name }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}" + _ASK
)


def chat_tokenizer(template, bos=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*SPECIAL, *alphabet])}, []))
    core.add_special_tokens(list(SPECIAL))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


def learned(tokenizer, packed):
    """The runs of tokens with a label, as text."""
    runs, before = [], False
    for ids, labels in zip(packed.input_ids.tolist(), packed.labels.tolist(), strict=True):
        for token, label in zip(ids, labels, strict=True):
            if label != -100:
                runs += [] if before else [[]]
                runs[-1].append(token)
            before = label != -100
    return [tokenizer.decode(run) for run in runs]
