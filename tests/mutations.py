"""Break every line of `mutants` in turn and see that a test fails: what no test notices is not tested.

    python tests/mutations.py                  run all of them and write build/mutations.json
    python tests/mutations.py --only triton    only those with this text in their description
    python tests/mutations.py --stale          only those not killed in the report, or whose file or tests changed since
    python tests/mutations.py --jobs 4         run this many at once

With --only and --stale the report keeps its other rows. Each row holds a fingerprint of what it depends on
(`fingerprints.py`), by which --stale knows what has changed since.

Each mutant lives in a temporary copy of the tree, so this tree never changes, and is tested in a fork of a process that
has already imported torch. The C++ extension is built once in such a copy; a mutant of C++ rebuilds what includes its
file, and one that does not compile is an error. A mutant that crashes or hangs counts as killed by the test that was
running. Exit status 1 if a mutant survives.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import native_builds
import pytest
from fingerprints import fingerprint
from mutants import MUTANTS, Mutant
from native_builds import Build

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "build" / "mutations.json"
COPIED = ("atp_kernels", "benchmarks", "tests/conftest.py", "tests/atp_kernels", "pyproject.toml")
BUILT_FROM = ("atp_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
LONGEST_TESTS = 600.0  # seconds
FORK = multiprocessing.get_context("fork")
Row = dict[str, str | float | None]


class FirstFailure:
    """A pytest plugin that keeps the name of the first failing test, and calls `start` with each test that starts."""

    name: str | None = None

    def __init__(self, start: Callable[[str], None]) -> None:
        self.start = start

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.start(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid


def copy_tree(target: Path, names: tuple[str, ...] = COPIED, build: Build | None = None) -> None:
    """Copy what the kernels' tests need, without bytecode, which could mask a mutant of the same size and second.

    The extension is that of `build`, if given, instead of the one in this tree.
    """
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    if build:
        shutil.copy(build.library, target / build.library.relative_to(build.root))


def failing_test(tests: str, start: Callable[[str], None]) -> str | None:
    """The first test of a selection that fails in this folder, or None; call it once per process.

    Raises RuntimeError if pytest cannot collect or run the tests, or runs them on another copy of the kernels.
    """
    sys.path.insert(0, os.getcwd())
    failure, said = FirstFailure(start), io.StringIO()
    options = ["-x", "-q", "--all", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    with contextlib.redirect_stdout(said):
        status = pytest.main([*options, *shlex.split(tests)], plugins=[failure])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest {tests} stopped with status {status}: {said.getvalue()}")
    tested = sys.modules["atp_kernels"].__file__
    if not Path(tested).is_relative_to(os.getcwd()):
        raise RuntimeError(f"the tests ran on {tested} instead of the copy in {os.getcwd()}: unset PYTHONPATH.")
    return failure.name


def send_failing_test(tests: str, sender: Connection) -> None:
    """Send `failing_test` as ("failed", name), after ("runs", name) of each test; ("error", text) if it raises."""
    try:
        sender.send(("failed", failing_test(tests, lambda name: sender.send(("runs", name)))))
    except RuntimeError as error:
        sender.send(("error", str(error)))


def first_failure(tests: str) -> str | None:
    """`failing_test` in its own process, since a mutant may crash or hang: that is a failure too."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=send_failing_test, args=(tests, sender))
    process.start()
    sender.close()
    end, running = time.monotonic() + LONGEST_TESTS, None
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            what, said = receiver.recv()
            if what == "error":
                raise RuntimeError(said)
            if what == "failed":
                return said
            running = said
        how = "does not end"
    except EOFError:
        process.join()
        how = f"ends with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if running is None:
        raise RuntimeError(f"pytest {tests} {how} before the first test.")
    return f"{running} ({how})"


def try_selection(folder: str, build: Build | None, tests: str) -> tuple[str, str | None]:
    """A selection and its first failure without any mutant."""
    os.chdir(tempfile.mkdtemp(dir=folder))
    copy_tree(Path.cwd(), build=build)
    return tests, first_failure(tests)


def try_mutant(folder: str, build: Build | None, mutant: Mutant) -> Row:
    """One row of the report: the mutant, the test that killed it (None: it survived), seconds and fingerprint."""
    start = time.monotonic()
    os.chdir(tempfile.mkdtemp(dir=folder))
    copy_tree(Path.cwd(), COPIED + ("csrc",) * mutant.compiled, build)
    path = Path(mutant.file)
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise RuntimeError(f"{mutant.file} does not have {mutant.old!r} exactly once: bring the mutants up to date.")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    if mutant.compiled:
        native_builds.rebuild(build, mutant.file, Path.cwd())
    killer = first_failure(mutant.tests)
    seconds = round(time.monotonic() - start, 1)
    return {"mutant": str(mutant), "killed by": killer, "seconds": seconds, "fingerprint": fingerprint(mutant)}


def run(mutants: list[Mutant], jobs: int) -> Iterator[Row]:
    """Yields the row of each mutant as it finishes. Raises RuntimeError if tests fail without any mutant."""
    with tempfile.TemporaryDirectory() as folder:
        build = None
        if any(mutant.compiled for mutant in mutants):
            unchanged = Path(tempfile.mkdtemp(dir=folder))
            copy_tree(unchanged, BUILT_FROM)
            build = native_builds.build(unchanged)
        # Forked, so that torch is imported once; one fork per selection keeps their imports apart.
        with ProcessPoolExecutor(jobs, mp_context=FORK) as pool:
            selections = dict.fromkeys(mutant.tests for mutant in mutants)
            for tests, failed in pool.map(functools.partial(try_selection, folder, build), selections):
                if failed:
                    raise RuntimeError(f"{failed} fails without any mutant: repair it first (pytest {tests}).")
            yield from pool.map(functools.partial(try_mutant, folder, build), mutants)


def read_report() -> list[Row]:
    return json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else []


def stale(mutants: Iterable[Mutant]) -> list[Mutant]:
    """Those that the report does not have as killed, or whose file or tests have changed since they ran."""
    known = {row["mutant"]: row.get("fingerprint") for row in read_report() if row["killed by"]}
    return [mutant for mutant in mutants if known.get(str(mutant)) != fingerprint(mutant)]


def write_report(rows: list[Row]) -> None:
    """Put these rows into the report, in the order of the table and without mutants that are no longer in it."""
    known = {row["mutant"]: row for row in [*read_report(), *rows]}
    ordered = [known[str(mutant)] for mutant in MUTANTS if str(mutant) in known]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def import_heavy_packages() -> None:
    """Import what every test imports, except the kernels."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a CUDA context would not survive the fork
    sys.dont_write_bytecode = True
    import conftest  # noqa: F401  chooses Triton's interpreter before triton is imported
    import hypothesis
    import torch.library  # noqa: F401
    import torch.utils.checkpoint  # noqa: F401

    # The first failing example is enough: do not shrink it.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutations", phases=phases)
    hypothesis.settings.load_profile("mutations")
    with contextlib.suppress(ModuleNotFoundError):
        import triton.language  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutants with this text in their description")
    parser.add_argument("--stale", action="store_true", help="only those not killed in the report, or changed since")
    parser.add_argument("--jobs", type=int, default=1, help="how many to run at once")
    options = parser.parse_args()
    import_heavy_packages()
    wanted = [mutant for mutant in MUTANTS if options.only in str(mutant)]
    wanted, rows = stale(wanted) if options.stale else wanted, []
    for row in run(wanted, options.jobs):
        print(f"{row['seconds']:6.1f} s  {row['mutant']}\n{'':10}{row['killed by'] or 'SURVIVES'}", flush=True)
        rows.append(row)
        write_report(rows)  # each time, so that an interrupted run loses nothing
    survivors = [row["mutant"] for row in rows if row["killed by"] is None]
    print(f"{len(rows) - len(survivors)} of {len(rows)} mutants killed", *survivors, sep="\n  ")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
