"""Jobs in this process, in other ones, on a Ray cluster of this machine and on a SLURM made of four small scripts."""

import os
import signal
import stat
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from tiny_command import everything, read, results

from atp.ground.errors import InputError, Interrupted, JobsFailed
from atp.ground.signals import SignalGuard
from atp.studies.compare import Comparison
from atp.studies.engines import Here, Job, choose
from atp.studies.engines.away import AwayWork
from atp.studies.sweep import Sweep
from atp.studies.sweep.units import UNITS, Asked

WORK = Path(__file__).parent / "work"
sys.path.insert(0, str(WORK))
import engine_work  # noqa: E402


@pytest.fixture
def said(monkeypatch):
    """The lines of an engine; processes that it starts find engine_work and this project."""
    root = Path(__file__).parents[4]
    path = os.pathsep.join([str(WORK), str(root), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as on many nodes, and unlike here; nothing written may tell
    return []


def ended(engine, *jobs):
    return {job.name: promise for job, promise in engine.results(jobs)}


# In this process


def test_here_one_follows_another_and_an_error_ends_all(tmp_path, said):
    jobs = [
        Job("first", partial(engine_work.write, tmp_path / "first")),
        Job("broken", engine_work.break_a_promise),
        Job("refused", engine_work.refuse),
        Job("never", partial(engine_work.write, tmp_path / "never")),
    ]
    found = []
    with pytest.raises(InputError, match="^the data file changed$"):
        for job, promise in Here(said.append).results(jobs):
            found.append((job.name, promise))
    assert found == [("first", None), ("broken", "budget: missed")]
    assert said == [f"writing {tmp_path / 'first'}"] and not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("name", "resources", "at_once", "sentence"),
    [
        ("moon", [], None, r"^--on 'moon' is unknown: use here, local, slurm, ray$"),
        ("here", ["mem_gb=4"], None, r"^--resource and --at-once are for --on local, slurm or ray: here one run"),
        ("here", [], 2, r"^--resource and --at-once are for"),
        ("local", [], None, r"^--on local needs --at-once N: how many runs this machine holds at a time$"),
        ("local", ["mem_gb"], 1, r"^--resource 'mem_gb' is not key=value: use for example --resource timeout_min=600$"),
        ("local", ["timeout_min=soon"], 1, r'^--on local: .*"timeout_min" expected type'),
        ("local", ["nodes=2"], 1, r"^--on local: LocalExecutor can use only one node"),
        ("slurm", ["colour=red"], None, r"^--on slurm: (Unknown argument|.*srun)"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_written(tmp_path, said, name, resources, at_once, sentence):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=sentence):
        choose(name, resources, at_once, tmp_path / "jobs", said.append)
    assert not list(tmp_path.iterdir())


def test_a_process_of_torchrun_hands_out_no_jobs(tmp_path, said, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave torchrun or accelerate launch out"):
        choose("local", [], 2, tmp_path / "jobs", said.append)


# In other processes


@pytest.mark.slow
def test_what_ends_one_job_leaves_the_others_alone(tmp_path, said):
    """A broken promise is yielded; refusals, errors and kills come at the end, in one sentence each."""
    pytest.importorskip("submitit")
    local = choose("local", [], 3, tmp_path / "jobs", said.append)
    jobs = [
        Job("there already", partial(engine_work.write, tmp_path / "there"), finished=True),
        Job("killed", engine_work.be_killed),
        Job("failed", engine_work.fail),
        Job("broken", engine_work.break_a_promise),
        Job("refused", engine_work.refuse),
        Job("last", partial(engine_work.write, tmp_path / "last")),
    ]
    found = {}
    with pytest.raises(JobsFailed) as error:
        for job, promise in local.results(jobs):
            found[job.name] = promise
    assert found == {"there already": None, "broken": "budget: missed", "last": None}
    assert (tmp_path / "last").is_file() and (tmp_path / "there").is_file()
    told = str(error.value).split("; ")
    assert sorted(one.partition(":")[0] for one in told) == ["failed", "killed", "refused"]
    assert "failed: ZeroDivisionError: division by zero" in told and "refused: the data file changed" in told
    killed = next(one for one in told if one.startswith("killed"))
    assert Path(killed.rpartition(" see ")[2]).is_file()
    assert "there already" not in " ".join(line for line in said if "job" in line), "what is finished is no job"
    logs = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "jobs").glob("*.out"))
    assert f"writing {tmp_path / 'last'}" in logs


@pytest.mark.slow
def test_a_signal_ends_the_jobs_that_run(tmp_path, said):
    pytest.importorskip("submitit")
    local = choose("local", [], 1, tmp_path / "jobs", said.append)
    jobs = [Job("first", partial(engine_work.wait, tmp_path / "first")), Job("second", engine_work.fail)]

    def strike():
        while not (tmp_path / "first").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    striker = threading.Thread(target=strike, daemon=True)
    with pytest.raises(Interrupted), SignalGuard(at_once=True):
        striker.start()
        ended(local, *jobs)
    process = int((tmp_path / "first").read_text())
    assert gone(process) and len(said) == 1, "the second was never handed out"


def gone(process, seconds=30):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_several_processes_of_a_job_find_each_other(tmp_path, said):
    pytest.importorskip("submitit")
    local = choose("local", ["tasks_per_node=2"], 1, tmp_path / "jobs", said.append)
    assert ended(local, Job("both", partial(engine_work.rank, tmp_path))) == {"both": None}
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first[:3] == ["0", "2", "0"] and second[:3] == ["1", "2", "1"] and first[3:] == second[3:]


@pytest.mark.slow
def test_a_comparison_in_other_processes_is_the_same(config, tmp_path, said, wide_budget):
    """Two members at a time; repeated, it starts no job; interrupted members would resume as runs do."""
    pytest.importorskip("submitit")
    methods = ["dense_lora", "random"]
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path / "unused")}
    settings = type(config).parse(values)

    def compare(folder, resume=False, engine=None):
        Comparison(settings, methods, [0], folder, resume=resume, command="atp compare", engine=engine).execute()

    local = choose("local", [], 2, elsewhere / "jobs", said.append)
    compare(elsewhere, engine=local)
    assert len(list((elsewhere / "jobs").glob("*_submitted.pkl"))) == 2
    compare(here)
    for method in methods:
        assert results(elsewhere / f"{method}-seed0") == results(here / f"{method}-seed0")
    ours, theirs = read(elsewhere, "comparison.json"), read(here, "comparison.json")
    assert {name: row["scores"] for name, row in ours["methods"].items()} == {
        name: row["scores"] for name, row in theirs["methods"].items()
    }
    members = {path: content for path, content in everything(elsewhere).items() if "-seed0/" in path}
    compare(elsewhere, resume=True, engine=local)
    assert {path: content for path, content in everything(elsewhere).items() if "-seed0/" in path} == members
    assert len(list((elsewhere / "jobs").glob("*_submitted.pkl"))) == 2


# Ray


@pytest.mark.slow
def test_a_sweep_on_a_ray_cluster_of_this_machine(config, tmp_path, said, wide_budget):
    """The shared part is a task, the two targets are tasks side by side, and the models are those of one process."""
    ray = pytest.importorskip("ray")
    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path / "unused")}
    values["training"] |= {"open": 2, "search": 0, "settle": 0, "tune": 2}
    values["evaluation"]["dense_baseline"] = False
    settings = type(config).parse(values)
    asked = [Asked(UNITS[0], 0.8), Asked(UNITS[0], 0.6)]
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        engine = choose("ray", ["num_cpus=1"], None, tmp_path / "unused", said.append)
        Sweep(settings, asked, tmp_path / "ray", resume=False, command="atp sweep", engine=engine).execute()
        assert sum("Ray task" in line for line in said) == 3
        with pytest.raises(JobsFailed, match="^failed: ZeroDivisionError: division by zero$"):
            ended(engine, Job("failed", engine_work.fail))
        with pytest.raises(InputError, match="^--on ray: "):
            choose("ray", ["colour=red"], None, tmp_path / "unused", said.append)
        with pytest.raises(InputError, match=r"^--decode-ms 20 would be measured on this machine"):
            timed = [Asked(UNITS[4], 20.0)]
            Sweep(settings, timed, tmp_path / "timed", resume=False, command="", engine=engine).execute()
    finally:
        ray.shutdown()
    Sweep(settings, asked, tmp_path / "here", resume=False, command="atp sweep").execute()
    for name in ("keep-0.8", "keep-0.6"):
        assert results(tmp_path / "ray" / name) == results(tmp_path / "here" / name)


# SLURM

COMMANDS = {
    # A queue of one machine: sbatch starts the script in the background, srun runs what follows its options.
    "sbatch": """
number=$(ls "$QUEUE" | grep -c '^[0-9]*$'); number=$((number + 1)); cp "$1" "$QUEUE/$number"
(export SLURM_JOB_ID=$number SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
 bash "$1" > /dev/null 2>&1; echo COMPLETED > "$QUEUE/$number.state") > /dev/null 2>&1 &
echo "Submitted batch job $number" """,
    "srun": """
while [ "${1#--}" != "$1" ]; do
  case "$1" in --output|--error) log=$2; [ "$1" = --output ] && out=$2; shift 2;; *) shift;; esac
done
out=${out//%j/$SLURM_JOB_ID}; exec "$@" > "${out//%t/0}" 2>&1""",
    "sacct": """
echo 'JobID|State|NodeList'
for state in "$QUEUE"/*.state; do [ -f "$state" ] && echo "$(basename "$state" .state)|$(cat "$state")|here"; done
exit 0""",
    "scancel": 'echo "$1" >> "$QUEUE/cancelled"',
}


@pytest.mark.slow
def test_jobs_go_to_slurm_with_their_resources(tmp_path, said, monkeypatch):
    pytest.importorskip("submitit")
    commands, queue = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir(), queue.mkdir()
    for name, script in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{script.lstrip()}\n", encoding="utf-8")
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(queue))
    wanted = ["partition=gpu", "gpus_per_node=1", "timeout_min=600"]
    with pytest.raises(InputError, match="^--on slurm: Unknown argument 'colour'"):
        choose("slurm", ["colour=red"], None, tmp_path / "jobs", said.append)
    slurm = choose("slurm", wanted, None, tmp_path / "jobs", said.append)
    assert slurm.elsewhere
    jobs = [
        Job("writes", partial(engine_work.write, tmp_path / "written")),
        Job("broken", engine_work.break_a_promise),
    ]
    assert ended(slurm, *jobs) == {"writes": None, "broken": "budget: missed"}
    assert (tmp_path / "written").read_text() == "here"
    script = (queue / "1").read_text(encoding="utf-8").splitlines()
    assert {"#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=1", "#SBATCH --time=600"} <= set(script)
    assert said[0].startswith("writes: job 1, ") and "writes: done" in said


def test_runs_on_other_machines_need_their_precision_named(config, tmp_path):
    class Elsewhere(Here):
        elsewhere = True

    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path / "unused")}
    values["training"]["precision"] = "auto"
    options = {"resume": False, "command": "", "engine": Elsewhere()}
    values = type(config).parse(values)
    for command in (
        Comparison(values, ["random"], [0], tmp_path / "out", **options),
        Sweep(values, UNITS[0].parse("0.8,0.6"), tmp_path / "out", **options),
    ):
        with pytest.raises(InputError, match=r"^training.precision is auto, which this machine would decide"):
            command.execute()
        assert not (tmp_path / "out").exists()


def test_work_elsewhere_begins_in_the_folder_of_its_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = AwayWork(partial(engine_work.write, "relative"))
    monkeypatch.chdir("/")
    assert work().how == "done"
    assert (tmp_path / "relative").is_file()


@pytest.mark.parametrize("module", ["submitit", "ray"])
def test_a_missing_engine_is_named_with_its_command(tmp_path, monkeypatch, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    name = {"submitit": "slurm", "ray": "ray"}[module]
    with pytest.raises(InputError, match=rf"^package '{module}' is not installed: run pip install"):
        choose(name, [], None, tmp_path / "jobs", said.append)
