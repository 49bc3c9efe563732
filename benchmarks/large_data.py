"""Time and peak memory of a large text file from rows to training windows: `python -m benchmarks.large_data`.

Documents are made of runs of four words from OpenWebText (package `evals`), so that they tokenize like real text and
share few phrases; one in fifty repeats most of another. Device-independent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN, SENTENCE = 4, 12  # words; runs
CHARACTERS = 1000  # of a document, about


def write_texts(path: Path, megabytes: float, seed: int = 0) -> int:
    """Writes JSON Lines of `megabytes` million bytes; returns the number of rows."""
    from atp.data.packages import openwebtext_passages

    rng, words = random.Random(seed), " ".join(openwebtext_passages()).split()
    runs = [" ".join(words[start : start + RUN]) for start in range(0, len(words) - RUN)]
    before: list[str] = ["a"]
    size = rows = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = " ".join(rng.choices(runs, k=round(CHARACTERS / 25 * rng.uniform(0.5, 1.5))))
            if rng.random() < 0.02:
                text = before[0] + " " + text[:200]
            before = [text]
            line = json.dumps({"text": text}) + "\n"
            file.write(line)
            size, rows = size + len(line), rows + 1
    return rows


def peak() -> float:
    """The largest resident memory of this process so far, in GB (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def main() -> None:
    """Prints one line of JSON per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the file and the cache; deleted in the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
        file = Path(folder, "texts.jsonl")
        if os.fork() == 0:  # whose memory is not ours
            write_texts(file, options.megabytes)
            os._exit(0)
        os.wait()
        measure(file, options)


def measure(file: Path, options: argparse.Namespace) -> None:
    """Reads, splits, tokenizes and hashes a file twice, the second time from the cache."""
    from atp.config import ModelConfig
    from atp.data import DataSettings, load_recipe, pack
    from atp.ground.places import PACKAGED_MODEL
    from atp.inputs.loading import load_tokenizer
    from atp.training.resume import of_samples

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - start
        print(json.dumps({"stage": stage, "seconds": round(seconds, 1), "peak_gb": round(peak(), 2)}), flush=True)
        return found

    def once(turn: str) -> None:
        splits = timed(f"{turn}: read and split", lambda: load_recipe(settings))
        train = timed(f"{turn}: tokenize and pack", lambda: pack(splits.train, tokenizer, options.length))
        timed(f"{turn}: hash all windows", lambda: of_samples(train))
        timed(f"{turn}: 1000 windows by chance", lambda: [train[random.randrange(len(train))] for _ in range(1000)])
        print(json.dumps({"data": splits.description, "windows": len(train), "tokens": train.tokens}), flush=True)

    tokenizer = timed("imports and tokenizer", lambda: load_tokenizer(ModelConfig(path=PACKAGED_MODEL)))
    settings = DataSettings(recipe="custom", train=str(file), general_share=0.0, workers=options.workers)
    once("first")
    once("again")


if __name__ == "__main__":
    main()
