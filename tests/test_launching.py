"""What docs/launching.md tells people to run is well formed. No cloud is asked."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
PAGE = (ROOT / "docs" / "launching.md").read_text()
SHELL_SCRIPTS = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_have_no_finding_of_shellcheck(script):
    shellcheck = Path(sysconfig.get_path("scripts"), "shellcheck")  # of this environment, active or not
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "statuses, restarts, last",
    [([0], 0, 0), ([75, 0], 1, 0), ([137, 143, 75, 0], 3, 0), ([75, 1], 1, 1), ([130], 0, 130), ([75] * 9, 2, 75)],
)
def test_keep_running_starts_again_what_asks_for_it(tmp_path, statuses, restarts, last):
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    command = tmp_path / "command.sh"
    command.write_text('status=$(head -n 1 statuses); sed -i 1d statuses; echo "$1" >> seen; exit "$status"\n')
    environment = os.environ | {"KEEP_RUNNING_PAUSE": "0", "KEEP_RUNNING_RESTARTS": "2" if len(statuses) > 4 else "9"}
    keep = [SCRIPTS / "keep_running.sh", "bash", command, "an argument"]
    done = subprocess.run(keep, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == last
    assert (tmp_path / "seen").read_text().splitlines() == ["an argument"] * (restarts + 1)


@pytest.mark.parametrize("moment, status", [("at work", 75), ("at work", 134), ("in the pause", 75)])
def test_sigterm_to_keep_running_reaches_the_command_and_ends_both(moment, status):
    leave = f"os._exit({status})"
    told = f"import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: {leave}); print(1, flush=True); "
    code = told + ("time.sleep(60)" if moment == "at work" else leave)
    keep = [SCRIPTS / "keep_running.sh", sys.executable, "-c", code]
    with subprocess.Popen(keep, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        if moment == "in the pause":
            assert "started again" in process.stderr.readline()
        process.terminate()
        assert process.wait(timeout=30) == status
        assert process.stdout.read() == "", "not started again"
        assert "started again" not in process.stderr.read()


def test_keep_running_without_a_command_says_how_it_is_used():
    done = subprocess.run([SCRIPTS / "keep_running.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


def printed(*arguments: str, **environment: str) -> list[list[str]]:
    """The commands of a dry run, each as its words."""
    command = [SCRIPTS / "tpu_pod.sh", "--dry-run", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    # bash reads what bash has quoted.
    show = ["set -f", "show() { printf '%s\\0' \"$@\" $'\\n'; }", *(f"show {line}" for line in lines)]
    words = subprocess.run(["bash", "-c", "\n".join(show)], capture_output=True, text=True, check=True)
    return [line.split("\0") for line in words.stdout.split("\0\n\0") if line]


def test_the_tpu_commands_are_one_gcloud_command_each():
    (create,) = printed("create", TPU_NAME="pod", ZONE="europe-west4-b", TPU_TYPE="v5litepod-64", SPOT="1")
    assert "--spot" not in printed("create", SPOT="0")[0]
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
    assert {"--zone=europe-west4-b", "--accelerator-type=v5litepod-64", "--spot"} <= set(create)
    (logs,) = printed("logs")
    assert logs[4] == "ssh" and "--worker=0" in logs and logs[-1].startswith("--command=tail")
    (delete,) = printed("delete")
    assert delete[4] == "delete" and "--quiet" in delete
    kept = printed("keep", "--config_path", "my.yaml")
    assert [words[4] if words[0] == "gcloud" else words[0] for words in kept] == [
        "delete", "create", "git", "scp", "ssh", "ssh", "ssh"
    ]  # fmt: skip


def test_what_runs_on_the_hosts_gets_its_arguments_whole(tmp_path):
    """The command that ssh is given is run here, with a home, a Python and a checkout that only note what they get."""
    arguments = ["--config_path", "my run.yaml", "--sample_prompts", '[it\'s "so", $HOME]']
    (run,) = printed("run", *arguments)
    remote = run[-1].removeprefix("--command=")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf \'%s\\n\' "$SECRET" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "run.env").write_text("export SECRET=known\n")
    checkout = tmp_path / "lora_dpo_jax" / "scripts"
    checkout.mkdir(parents=True)
    (checkout / "keep_running.sh").symlink_to(SCRIPTS / "keep_running.sh")
    subprocess.run(
        ["bash", "-c", f"{remote}\nwait"], cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, check=True
    )
    assert (tmp_path / "run.log").read_text().splitlines() == ["known", "-m", "lora_dpo_jax.main", *arguments]
    assert (tmp_path / "finished").read_text().strip() == "0"


# Tells what the files beside it say, a line each time, and notes what it is asked.
GCLOUD = """#!/bin/bash
cd "$(dirname "$0")"
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
*\\ describe\\ *)
    state=$(next states)
    case "$state" in
    NOT_FOUND | "") echo "ERROR: ${state:-no network}" >&2; exit 1 ;;
    *) echo "$state"; exit ;;
    esac ;;
*"cat finished"*) next looks; exit ;;
*keep_running*) echo run >> seen ;;
*) echo "$4" >> seen ;;
esac
[ "$4" != "${FAILS:-}" ]
"""


@pytest.mark.parametrize(
    "states, looks, verbs, last",
    [
        ("NOT_FOUND READY READY READY", "idle running 0", "create scp ssh run", 0),
        ("READY READY", "running 3", "", 3),  # begun by an earlier keep
        ("READY READY READY", "0 running 1", "scp ssh run", 1),  # of an earlier run
        ("READY  PREEMPTED READY READY", "running idle 0", "delete create scp ssh run", 0),
        ("READY CREATING READY READY", "running idle 0", "scp ssh run", 0),  # its hosts were started again
        ("   READY", "", "", 1),  # no network, no project, no login: nothing is made or deleted
    ],
)
def test_keep_begins_a_run_once_on_each_slice(tmp_path, states, looks, verbs, last):
    done = keep(tmp_path, states, looks)
    assert (tmp_path / "seen").read_text().split() == verbs.split()
    assert done.returncode == last, done.stderr


def test_keep_begins_no_run_where_the_install_failed(tmp_path):
    done = keep(tmp_path, "READY READY READY READY", "idle idle idle", FAILS="scp")
    assert (tmp_path / "seen").read_text().split() == ["scp", "scp", "scp"]
    assert done.returncode == 1 and "3 failures in a row" in done.stderr


def keep(folder: Path, states: str, looks: str, **environment: str) -> subprocess.CompletedProcess:
    for name, lines in {"states": states, "looks": looks, "seen": ""}.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines.split(" ")) if lines else "")
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "KEEP_PAUSE": "0", "KEEP_FAILURES": "3"}
    command = [SCRIPTS / "tpu_pod.sh", "keep", "--config_path", "my.yaml"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_nothing_is_done_for_words_after_a_verb_that_takes_none():
    """`create --dry-run` would make a slice."""
    for words in (["create", "--dry-run"], ["delete", "it"], ["run"], ["keep"], []):
        done = subprocess.run([SCRIPTS / "tpu_pod.sh", *words], capture_output=True, text=True)
        assert done.returncode == 2 and "tpu_pod.sh [--dry-run] create" in done.stderr


@pytest.mark.parametrize("status, is_queued_again", [(0, False), (1, False), (75, True), (137, True)])
def test_a_slurm_job_is_queued_again_when_the_run_asks_for_it(tmp_path, status, is_queued_again):
    for name, does in {
        "srun": f'printf "%s\\n" "$@" > srun.seen; exit {status}',
        "scontrol": 'echo "$@" > again',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = ["bash", SCRIPTS / "slurm.sbatch", "--config_path", "my run.yaml"]
    assert subprocess.run(job, cwd=tmp_path, env=os.environ | environment, capture_output=True).returncode == status
    assert (tmp_path / "srun.seen").read_text().splitlines()[-4:] == [
        "-m", "lora_dpo_jax.main", "--config_path", "my run.yaml"
    ]  # fmt: skip
    assert (tmp_path / "again").exists() == is_queued_again


def test_the_job_of_gke_fails_on_mistakes_and_restarts_on_all_else():
    (job,) = yaml.safe_load_all((SCRIPTS / "gke_jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16 // 4
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "else Kubernetes takes no podFailurePolicy"
    (container,) = pod["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2, 126, 127]}
    assert job["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert container["command"] == ["python", "-m", "lora_dpo_jax.main"], "no shell that keeps SIGTERM to itself"


def test_the_task_of_skypilot_gives_each_host_what_it_needs_to_find_the_others():
    from lora_dpo_jax.processes.start import _torch_arguments

    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert task.keys() <= {"num_nodes", "resources", "workdir", "envs", "setup", "run", "name", "file_mounts"}
    exports = "\n".join(line for line in task["run"].splitlines() if line.startswith("export"))
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", f"{exports}\nenv"], env=os.environ | given, capture_output=True, text=True)
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert _torch_arguments(environment, False) == {
        "coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 1
    }  # fmt: skip
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_page_names_what_there_is():
    for path in re.findall(r"scripts/[\w.]+", PAGE):
        assert (ROOT / path).exists(), path
    assert {path.name for path in SCRIPTS.iterdir()} <= set(re.findall(r"scripts/([\w.]+)", PAGE))
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
        for line in block.splitlines():
            if "tpu_pod.sh" in line:
                verb = next(word for word in shlex.split(line)[1:] if "=" not in word and word != "--dry-run")
                assert verb in ("create", "install", "run", "logs", "stop", "keep", "delete"), line


def test_what_is_launched_takes_a_python_that_the_newest_jax_is_for():
    """JAX has left 3.11 behind, and with it what TPUs run on."""
    texts = [PAGE, *(path.read_text() for path in SCRIPTS.iterdir())]
    named = [version for text in texts for version in re.findall(r"(?:--python |FROM python:)(3\.\d+)", text)]
    assert len(named) == 3 and set(named) == {"3.12"}
