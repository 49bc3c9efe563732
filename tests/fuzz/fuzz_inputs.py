"""Feed the program broken input and see that it answers in one short sentence.

    python tests/fuzz/fuzz_inputs.py                      all kinds, 8,400 cases
    python tests/fuzz/fuzz_inputs.py --kinds csv parquet  some of them
    python tests/fuzz/fuzz_inputs.py --scale 0.1          a tenth of the cases
    python tests/fuzz/fuzz_inputs.py --case csv 17        one case, with its traceback

A case is a function of its kind and number alone. It may succeed, or raise `InputError` with a message of at most
LONGEST printable characters on one line, within SECONDS of processor time. Anything else is a failure. Exit status 1
when there is one.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a broken name must not be looked for
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command line sets it


from fuzz_data import arrow_case, csv_case, folder_case, gzip_case, json_case, jsonl_case, parquet_case
from fuzz_draws import quiet
from fuzz_models import gguf_case, index_case, model_config_case, safetensors_case, tokenizer_case
from fuzz_settings import config_case, experiment_case, override_case, report_case

from atp.ground.errors import InputError

SECONDS, WAITED = 5.0, 60.0  # of work, and of waiting for something or for a busy machine
LONGEST = 999  # a whole message is cut at 1,000: whatever it quotes must have been cut before


class TooSlow(BaseException):
    """A case took longer than SECONDS, or WAITED longer than that."""


CASES = {
    "config": (config_case, 1000), "override": (override_case, 1000), "experiment": (experiment_case, 400),
    "report": (report_case, 300), "jsonl": (jsonl_case, 600), "json": (json_case, 600), "gzip": (gzip_case, 400),
    "csv": (csv_case, 500), "parquet": (parquet_case, 500), "arrow": (arrow_case, 500), "folder": (folder_case, 400),
    "model config": (model_config_case, 500), "index": (index_case, 400), "tokenizer": (tokenizer_case, 500),
    "safetensors": (safetensors_case, 500), "gguf": (gguf_case, 300),
}  # fmt: skip
"""Kind -> (case, how many of it at scale 1)."""


def run_case(kind, number, folder):
    """`accepted` or `refused`; raises what the case must not raise, and `TooSlow`."""
    draw = random.Random(f"{kind} {number}")
    limits = (signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITED)
    before = [(signal.signal(sign, _too_slow), signal.setitimer(timer, seconds)) for sign, timer, seconds in limits]
    try:
        CASES[kind][0](draw, folder)
        return "accepted"
    except InputError as error:
        message = str(error)
        if not (len(message) <= LONGEST and message.isprintable() and message):
            raise AssertionError(f"a message of {len(message)} characters: {message[:300]}") from error
        return "refused"
    finally:
        for (sign, timer, _), (handler, left) in zip(limits, before, strict=True):
            signal.setitimer(timer, *left)
            signal.signal(sign, handler)


def _too_slow(*_):
    raise TooSlow


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"))
    options = parser.parse_args()
    quiet()
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(options.case[0], int(options.case[1]), Path(folder)))
        return
    broken, total = 0, 0
    for kind in options.kinds:
        counts, slowest, started = Counter(), 0.0, time.process_time()
        for number in range(round(options.scale * CASES[kind][1])):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.process_time()
                try:
                    counts[run_case(kind, number, Path(folder))] += 1
                except (Exception, TooSlow) as error:
                    counts["FAILED"] += 1
                    print(f"--case {kind} {number}: {type(error).__name__}: {str(error)[:300]}")
                    print("".join(traceback.format_tb(error.__traceback__)[-3:]), flush=True)
                slowest = max(slowest, time.process_time() - begun)
        broken, total = broken + counts["FAILED"], total + counts.total()
        found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        work = f"slowest {slowest:.1f} s of work, all {time.process_time() - started:.0f} s"
        print(f"{kind}: {counts.total()} cases, {found}; {work}", flush=True)
    print(f"{total} cases, {broken} failed")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
