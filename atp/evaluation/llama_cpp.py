"""llama.cpp itself, from the ready-made wheels of package xllamacpp."""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atp.ground.errors import InputError


def require_llama_cpp() -> Any:
    """The module. Raises `InputError` where it is not installed."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise InputError(f"llama.cpp is not installed ({error}): pip install xllamacpp") from None


class LlamaCpp:
    """A model in llama.cpp.

    exact: with float32 keys and values and without flash attention, to compare what it computes; else as it runs by
    default. context: tokens that it has room for. Raises `InputError` where package xllamacpp is not installed.
    """

    def __init__(self, path: Path, context: int = 512, *, exact: bool = True, threads: int = 1) -> None:
        library = require_llama_cpp()
        params = library.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_predict = context, 1, 1
        if exact:
            params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib = params.verbosity = 0
        params.warmup = params.ctx_shift = False
        self.server = library.Server(params)

    def log_probabilities(self, ids: Iterable[int], count: int, letter: int) -> dict[int, float]:
        """Token -> natural logarithm of its probability after these ids, for the `count` most likely tokens.

        letter: a token of plain text, which is forced as the next one without a change of what is returned: llama.cpp
        returns nothing of a token that is a part of a character, or that ends the text.
        """
        answer = self._complete(ids, n_predict=1, n_probs=count, temperature=0, logit_bias=[[letter, 1000.0]])
        (position,) = answer["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}

    def greedy(self, ids: Iterable[int], length: int) -> list[int]:
        """The ids of the most likely continuation, with the token that ends it."""
        answer = self._complete(ids, n_predict=length, n_probs=1, temperature=0)
        return [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]

    def speed(self, ids: Iterable[int], new: int) -> tuple[float, float]:
        """Tokens per second by its own clock: of the prompt, and of `new` tokens after it."""
        timings = self._complete(ids, n_predict=new, temperature=0, ignore_eos=True)["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]

    def decode_seconds(self, ids: Iterable[int], new: int) -> tuple[float, float]:
        """Seconds for each of `new` tokens: by its own clock, and of processor time.

        Processor time is that of all threads of this process, beyond what the prompt and a first token take. With one
        thread other processes change it little; several threads also spend it waiting for each other.
        """
        ids, spent = list(ids), []
        for count in (1, new + 1):
            start = time.process_time()
            timings = self._complete(ids, n_predict=count, temperature=0, ignore_eos=True)["timings"]
            spent.append(time.process_time() - start)
        return 1 / timings["predicted_per_second"], (spent[1] - spent[0]) / new

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text; special: with what the tokenizer puts around it, and with special tokens recognized."""
        body = json.dumps({"content": text, "add_special": special, "parse_special": special})
        with closing(HTTPConnection(urlsplit(self.server.listening_address).netloc, timeout=60)) as connection:
            connection.request("POST", "/tokenize", body.encode(), {"Content-Type": "application/json"})
            return json.load(connection.getresponse())["tokens"]

    def _complete(self, ids: Iterable[int], **options: Any) -> dict[str, Any]:
        answer = self.server.handle_completions({"prompt": list(map(int, ids)), "cache_prompt": False, **options})
        assert "choices" in answer, answer
        return answer


def rates(
    paths: Sequence[Path], *, threads: int, rounds: int = 5, prompt: int = 256, new: int = 64
) -> list[tuple[float, float]]:
    """Tokens per second of each file, of a prompt and of new tokens: medians over rounds in which the files take turns.

    The first round warms up. Raises `InputError` where package xllamacpp is not installed.
    """
    runtimes = [LlamaCpp(path, prompt + new + 8, exact=False, threads=threads) for path in paths]
    found: list[list[tuple[float, float]]] = [[] for _ in paths]
    for round_ in range(rounds + 1):
        turns = list(zip(runtimes, found, strict=True))
        for runtime, speeds in turns if round_ % 2 else reversed(turns):
            # Which tokens a prompt holds does not matter, and these exist in any vocabulary.
            speeds.append(runtime.speed([20 + n % 16 for n in range(prompt)], new))
    prefill, decode = ([statistics.median(s[part] for s in speeds[1:]) for speeds in found] for part in (0, 1))
    return list(zip(prefill, decode, strict=True))
