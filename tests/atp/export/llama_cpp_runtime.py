"""llama.cpp itself, from the ready-made wheels of package xllamacpp."""

import json
from urllib.request import Request, urlopen

import pytest

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp, then run these tests again"
)


class LlamaCpp:
    """A model in llama.cpp with float32 keys and values, on one thread."""

    def __init__(self, path, context=512):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_predict = context, 1, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = params.verbosity = 0
        params.warmup = params.ctx_shift = False
        self.server = xllamacpp.Server(params)

    def log_probabilities(self, ids, count, letter):
        """Token -> natural logarithm of its probability after these ids, for the `count` most likely tokens.

        letter: a token of plain text, which is forced as the next one without a change of what is returned: llama.cpp
        returns nothing of a token that is a part of a character, or that ends the text.
        """
        answer = self._complete(ids, n_predict=1, n_probs=count, temperature=0, logit_bias=[[letter, 1000.0]])
        (position,) = answer["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}

    def greedy(self, ids, length):
        """The ids of the most likely continuation, with the token that ends it."""
        answer = self._complete(ids, n_predict=length, n_probs=1, temperature=0)
        return [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]

    def tokenize(self, text, *, special):
        """The ids of a text; special: with what the tokenizer puts around it, and with special tokens recognized."""
        body = json.dumps({"content": text, "add_special": special, "parse_special": special}).encode()
        request = Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as response:
            return json.load(response)["tokens"]

    def _complete(self, ids, **options):
        answer = self.server.handle_completions({"prompt": list(map(int, ids)), "cache_prompt": False, **options})
        assert "choices" in answer, answer
        return answer
