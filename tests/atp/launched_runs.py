"""Whole runs of the tiny model, launched as users do: in one process, or in two that torchrun starts."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import yaml
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SEARCH, SETTLE, TUNE = 4, 2, 2
STEPS = SEARCH + SETTLE + TUNE
TOLERANCE = 1e-5  # of weights: several processes add in another order than one


def write_settings(config, folder):
    """Paths of a YAML file for two processes, and of one for a single process that sees the same batches."""
    values = config.model_dump(mode="json")
    values["lora"]["dropout"] = 0.0  # drawn per process
    values["training"] |= {"search": SEARCH, "settle": SETTLE, "tune": TUNE, "save_every": 1}
    values["evaluation"] |= dict(dense_baseline=False, windows=2, questions=2, every=STEPS, validation_windows=2)
    paths = []
    for name, accumulation in (("two", 1), ("one", 2)):
        values["training"]["gradient_accumulation"] = accumulation
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values), encoding="utf-8")
    return paths


def start(arguments, *, two=True, environment=None, launcher=(), program=("-m", "atp")):
    """The process of an `atp` command, or of the torchrun that started it twice; launcher: more options of torchrun.

    program: what Python runs instead of the command.
    """
    command = [*([*LAUNCH, *launcher] if two else [sys.executable]), *program, *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def end_of_each(cases):
    """Exit codes and output of the processes of each case: {"commands": arguments, "folders": where each works}.

    As if each had a machine of its own. They are forked from a process that has imported everything, because importing
    takes longer than all that they do.
    """
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def fork_each(commands, folders):
    """(exit codes, what was printed) of processes that this one forks, which join to one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    with tempfile.TemporaryFile("w+") as output:
        for rank, (command, folder) in enumerate(zip(commands, folders, strict=True)):
            child = os.fork()
            if not child:
                os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{len(commands)}", "MASTER_PORT": f"{port}",
                               "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
                become(command, folder, output.fileno())
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        return codes, output.read()


def become(command, folder, output):
    from atp.cli import cli

    signal.alarm(120)  # nobody waits for ever
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.argv = ["atp", *command]
        cli.main()
    except SystemExit as done:
        code = done.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process, code=0):
    """What a process printed, which ends with this code; in five minutes, or it is ended with its children."""
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"it does not end; until then:\n{process.communicate()[0]}") from None
    assert process.returncode == code, output
    return output


def wait_for_steps(process, folder, count):
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def assert_equal(folder, expected):
    """Two runs have the same decisions, the same model and losses but for rounding, and record every step once."""
    found, wanted = (load_file(run / "decisions.safetensors")["mask"] for run in (folder, expected))
    assert found.equal(wanted), "decisions"
    found, wanted = ({k: v for f in run.glob("model/*.safetensors") for k, v in load_file(f).items()}
                     for run in (folder, expected))  # fmt: skip
    assert found.keys() == wanted.keys()
    for key in found:
        assert found[key].shape == wanted[key].shape, key
        assert (found[key] - wanted[key]).abs().max() <= TOLERANCE, key
    records, wanted = ([json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (folder, expected))
    assert [record["step"] for record in records] == [*range(1, STEPS + 1), STEPS]
    for record, other in zip(records, wanted, strict=True):
        for loss in ("loss", "validation_loss"):
            assert abs(record.get(loss, 0.0) - other.get(loss, 0.0)) <= 1e-5 * other.get(loss, 0.0)
    assert not list(folder.rglob(".writing-*"))


if __name__ == "__main__":
    import atp.baselines
    import atp.cli.cli
    import atp.run  # noqa: F401

    print(json.dumps([fork_each(**case) for case in json.loads(sys.argv[1])]))
