"""A tiny Llama with a word tokenizer, and its log-probabilities in float64."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LABELS = ("yes", "no", "maybe")
WORDS = ["<unk>", "</s>", "<s>", *LABELS, *"not sure the cat sat on mat is it ? Answer :".split()]
VOCAB = 32


def tiny_model(seed=0, layers=2, vocabulary=VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128, initializer_range=0.3,
        eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def word_tokenizer(bos=False):
    """One token a word; with bos, encodings begin with `<s>` as Llama's do."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        begin = ("<s>", WORDS.index("<s>"))
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", **names)


def float64_log_probs(model, ids):
    """Log-probabilities after every token of one sequence, float64 [length, vocab], unbatched and unpadded."""
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        return double(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
