"""The files in deploy/: valid, in step with the command line and the Dockerfile, and able to go on where they were stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import streamquant
from streamquant.cli import cli
from streamquant.convert import DEFAULT_MEMORY
from streamquant.memory import BOOKKEEPING_BYTES, RESERVE_BYTES, Container
from streamquant.sizes import parse_size
from tests.checkpoints import weight, write_checkpoint

ROOT = Path(streamquant.__file__).parent.parent
MANIFEST = ROOT / "deploy" / "kubernetes.yaml"
SCRIPT = ROOT / "deploy" / "slurm.sh"
NUM_TENSORS = 100_000
PLANNED_BYTES = (250 << 20) + 3000 * NUM_TENSORS  # what a process has that has planned so many

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" &
trap 'kill -KILL $!' TERM  # as srun does
wait $!
"""
APPTAINER = """#!/bin/bash
[[ $1 == run && $2 == --bind && -d $3 && $4 == image.sif ]] || exit 99
shift 4
echo $$ > program.pid
exec {python} -m streamquant "$@" --observer mse --threads 1 --max-shard-size 300KB
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.log
"""


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return list(yaml.safe_load_all(MANIFEST.read_text()))


@pytest.fixture(scope="module")
def pod(documents: list[dict[str, Any]]) -> dict[str, Any]:
    [job] = [document for document in documents if document["kind"] == "Job"]
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


def test_the_manifest_is_what_kubernetes_takes(documents: list[dict[str, Any]]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "Job"]
    for document in documents:
        for version in ("1.29", validator.latest_version()):  # from which on there is podReplacementPolicy
            validator.validate(document, version, strict=True)


def test_the_job_runs_a_command_line_that_exists_and_writes_into_volumes_alone(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    command, *arguments = container["args"]
    given = cli.commands[command].make_context(command, list(arguments)).params
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    assert all(str(Path(given[file]).parent) in mounts for file in ("out", "log_json"))
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["restartPolicy"] == "OnFailure"


def test_the_limit_of_the_job_allows_the_default_budget_with_very_many_tensors(pod: dict[str, Any]) -> None:
    resources = pod["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    limit = parse_size(f"{resources['limits']['memory']}B")
    reserve = RESERVE_BYTES + 3 * NUM_TENSORS * BOOKKEEPING_BYTES
    assert Container(limit, PLANNED_BYTES, reserve).working_bytes >= parse_size(DEFAULT_MEMORY["cpu"])


def test_the_user_of_the_job_is_that_of_the_image_and_may_write_to_the_volume(pod: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)
    assert user is not None
    assert f"useradd --uid {user[1]} " in dockerfile
    context = pod["securityContext"]
    assert [str(context[key]) for key in ("runAsUser", "runAsGroup", "fsGroup")] == [user[1], user[2], user[2]]
    assert context["runAsNonRoot"]


def test_the_image_is_built_from_files_that_reach_docker() -> None:
    wanted = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert {file for files in copied for file in files} == wanted
    assert all((ROOT / file).exists() for file in wanted)


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert (checked.stdout, checked.returncode) == ("", 0)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on a machine with stand-ins for Slurm and Apptainer."""
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": weight(512, 1024, seed=index) for index in range(12)}
    write_checkpoint(tmp_path / "source", tensors, config={"num_hidden_layers": 12})
    for name, text in {"srun": SRUN, "apptainer": APPTAINER, "scontrol": SCONTROL}.items():
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(text.format(python=sys.executable) if name == "apptainer" else text)
        stand_in.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    wish = {"SOURCE": "source", "OUT": "results/out", "SCHEME": "W4A16", "IMAGE": "image.sif"}
    return os.environ | slurm | wish | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def start(environment: dict[str, str], tmp_path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def stop_step(job: subprocess.Popen[bytes], tmp_path: Path) -> int:
    """Send SIGTERM to the step, as Slurm does, once a file is finished; returns how the job ended."""
    while not list((tmp_path / "results" / "out").glob("*.safetensors")) and job.poll() is None:
        time.sleep(0.01)
    os.kill(int((tmp_path / "program.pid").read_text()), signal.SIGTERM)
    return job.wait(timeout=60)


def test_a_job_of_slurm_is_requeued_when_its_time_is_over_and_goes_on(cluster: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    assert stop_step(start(cluster, tmp_path), tmp_path) == 75
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert not (out / "config.json").exists()
    assert start(cluster | {"SLURM_RESTART_COUNT": "1"}, tmp_path).wait(timeout=120) == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert finished.items() <= {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}.items()
    assert not streamquant.verify(out, against=tmp_path / "source").problems
    assert '"event": "resume"' in (tmp_path / "results" / "out.log.jsonl").read_text()


def test_a_job_of_slurm_is_not_requeued_for_ever_nor_for_what_stays_wrong(cluster: dict[str, str], tmp_path: Path) -> None:
    assert stop_step(start(cluster | {"SLURM_RESTART_COUNT": "20"}, tmp_path), tmp_path) == 75
    assert start(cluster | {"SCHEME": "W4A17"}, tmp_path).wait(timeout=60) == 2
    assert not (tmp_path / "scontrol.log").exists()
