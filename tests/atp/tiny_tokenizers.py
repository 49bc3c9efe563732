"""Small tokenizers of the kinds that the families have, trained on a few sentences."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; it sleeps.",
    "In 2024, we'll have    spaces,\ttabs\n\nand new lines (and brackets).",
    "def f(x):\n    return x ** 2  # code, 3.14159",
    "Größe, naïve café, 東京 and emoji 🚀🚀 mixed in.",
    "WE'RE NOT SURE, I'M TOLD. She said: 'they've gone'...",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _split(pattern):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def _gpt2():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


PRE_TOKENIZERS = {
    "gpt-2": (_gpt2, False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]), False),
    "llama-bpe": (lambda: _split(LLAMA3), True),
    "smaug-bpe": (lambda: _split(LLAMA3), False),
    "qwen2": (lambda: _split(QWEN2), False),
    "tekken": (lambda: _split(TEKKEN), True),
}
"""llama.cpp's name -> what makes the pre-tokenizer, and whether words of the vocabulary skip the merges."""


def byte_level(name="gpt-2", vocab_size=340, template="{{ messages[0]['content'] }}", pre_tokenizer=None, bos=False):
    """Byte-level BPE with one token that is not special (`<tool>`)."""
    make, ignore_merges = PRE_TOKENIZERS[name]
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizer or make()
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 2, trainer)
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    if name == "qwen2":
        core.normalizer = normalizers.NFC()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], core.token_to_id(SPECIAL[1]))]
        )
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0], "pad_token": SPECIAL[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(*, metaspace=None, complete=True, template=None):
    """BPE with byte tokens as in Llama 2. complete: whether every way to split a token is a merge.

    metaspace: when the newer pre-tokenizer puts a space before a text: `first`, `always` or `never`; `gemma` for spaces
    as Gemma's tokenizer treats them.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    order = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in order)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:end], piece[end:])
        for piece, _ in order
        for end in range(1, len(piece))
        if piece[:end] in vocabulary and piece[end:] in vocabulary
    ]
    if not complete:
        merges = merges[:-1]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace == "gemma":
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    if template:
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
        tokenizer.chat_template = template
    return tokenizer


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that begins with a special token."""
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }} Answer:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""One that begins with text, after the token that begins any text."""
