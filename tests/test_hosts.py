"""Two real processes on loopback: what they must agree on, and a process that is missing or dead.

`python -m recursive_jax.train` tells every difference by name before the first step.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import jax
import local_multiprocess
import numpy as np
import pytest
from absl import flags

from recursive_jax import hosts, rendezvous
from recursive_jax.console import host_flags
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.weights import hf
from recursive_jax.weights.source import ASSETS

LLAMA = DecoderConfig(
    "llama", 4096, 16, 32, num_heads=2, num_kv_heads=1, head_dim=8, num_layers=2, tied_head=True
)
SECONDS = 60  # a process that has no peer must have ended by then


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with two sources and two texts of equal names and sizes."""
    place = tmp_path_factory.mktemp("hosts")
    for number in (1, 2):
        params = jax.tree.map(
            lambda x, n=number: np.full(x.shape, n, x.dtype), abstract_params(LLAMA)
        )
        hf.save_params(params, LLAMA, place / f"source{number}")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ASSETS / "tiny" / name, place / f"source{number}")
        lines = [json.dumps({"text": f"{number} {n} and more words " * 5}) for n in range(200)]
        (place / f"text{number}.jsonl").write_text("\n".join(lines))
    return place


def train(place, *own):
    """The two processes of a training run, each with arguments of its own."""
    common = [
        "--config=configs/tiny_smoke.py", f"--workdir={place / 'run'}",
        f"--config.source={place / 'source1'}", f"--config.data.train={place / 'text1.jsonl'}",
        f"--config.data.cache_dir={place / 'cache'}", "--config.data.context_length=32",
        "--initialization_timeout=60", "--host_timeout=60",
    ]  # fmt: skip
    flags = local_multiprocess.places(2)
    return commands.run_together(
        "train", [[*common, *f, *o] for f, o in zip(flags, own, strict=True)]
    )


def error_of(process, code=2):
    """The only error line of a process that has ended with this code."""
    (line,) = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
    assert process.returncode == code and "Traceback" not in process.stderr, process.stderr
    return line


def test_settings_seed_and_source_that_differ_are_named(place):
    """The same source under another path is no difference."""
    shutil.copytree(place / "source1", place / "copy")
    rate = "--config.optimizer.learning_rate=0.03"
    own = [f"--config.source={place / 'copy'}", rate], ["--config.seed=5"]
    errors = [error_of(process) for process in train(place, *own)]
    assert errors[0] == errors[1]
    assert re.search(
        r"optimizer.learning_rate is 0.03 on process 0 of 2 \(.+\) and 0.003 on process 1 of 2",
        errors[0],
    )
    assert re.search(r"config.seed is 0 on process 0 .* and 5 on process 1 ", errors[0])
    assert "source" not in errors[0]
    assert not (place / "run").exists(), "nothing is written"

    source = f"--config.source={place / 'source2'}"
    errors = [error_of(process) for process in train(place, [], [source])]
    assert errors[0] == errors[1] and "differ: source (content) is " in errors[0]


def test_text_that_differs_is_named(place):
    text = f"--config.data.train={place / 'text2.jsonl'}"
    errors = [error_of(process) for process in train(place, [], [text])]
    assert errors[0] == errors[1] and "differ: training text is " in errors[0]
    assert not (place / "run").exists()


def test_workdirs_that_differ_are_named(place):
    other = f"--workdir={place / 'other'}"
    errors = [error_of(process) for process in train(place, [], [other])]
    assert errors[0] == errors[1]
    assert re.search(r"process 1 of 2 \(.+\) has \S+/other, which is not the \S+/run of", errors[0])


def test_the_error_of_one_process_ends_the_other_with_its_name(place):
    own = [], [f"--config.source={place / 'none'}"]
    first, second = (error_of(process) for process in train(place, *own))
    assert second.startswith(f"error: {place / 'none'} does not exist")
    assert re.match(r"error: process 1 of 2 \(.+\) failed: \S+/none does not exist", first)


def test_storage_that_fails_ends_all_with_the_code_of_a_run_that_goes_on(place):
    """The launch files start it again, and stop at a user's mistake."""
    resource = pytest.importorskip("resource")
    short = ["--config.data.train=" + str(place / "text1.jsonl"), "--config.tokens=256"]
    before = resource.prlimit(commands.server().pid, resource.RLIMIT_FSIZE)
    limit = (100_000, before[1])  # bytes of the largest file: the tokenizer has more
    resource.prlimit(commands.server().pid, resource.RLIMIT_FSIZE, limit)
    try:
        ends = train(place, short, short)
    finally:
        resource.prlimit(commands.server().pid, resource.RLIMIT_FSIZE, before)
    for process in ends:
        assert "File too large: " in error_of(process, 75)


def test_a_process_that_does_not_come_is_named(place):
    """Of either number, and beside a second process with the same number."""

    def alone(number, *more):
        flags = [*local_multiprocess.places(2)[number], *more]
        return commands.run("train", "--config=configs/tiny_smoke.py", "--workdir=run", *flags)

    first = alone(0, "--initialization_timeout=2")
    assert re.search(r"1 of 2 processes have arrived: 0 \(.+\); missing: process 1 after 1 of 2 s",
                     first.stderr)  # fmt: skip
    assert "missing: process 1 within --initialization_timeout=2 s" in error_of(first, 75)
    second = error_of(alone(1, "--initialization_timeout=2"), 75)
    assert re.search(r"process 1: process 0 at localhost:\d+ does not answer \(.+refused\) within",
                     second)  # fmt: skip

    flags = local_multiprocess.places(3)
    command = ["--config=configs/tiny_smoke.py", "--workdir=run"]
    three = commands.run_together("train", [[*command, *flags[n]] for n in (0, 1, 1)])
    assert all("two processes have --process_id=1" in p.stderr or
               "another process has --process_id=1" in p.stderr for p in three)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed"], "give --coordinator, --num_processes, --process_id"),
        (["--nodistributed", "--process_id=0"], "--nodistributed contradicts --coordinator"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    process = commands.run("train", "--config=configs/tiny_smoke.py", "--workdir=run", *flags)
    assert message in error_of(process)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(place):
    rows = "--config.data.batch_size=3"
    for process in train(place, [rows], [rows]):
        error = error_of(process)
        assert "data.batch_size=3 does not divide over the 2 devices" in error
        assert "(1 each on processes 0, 1)" in error
    assert not (place / "run").exists()


def test_a_coordinator_that_cannot_be_found_is_named_in_time():
    place, begin = rendezvous.Place("nowhere.invalid:8476", 2, 1), time.monotonic()
    with pytest.raises(hosts.MissingHosts, match="process 0 at nowhere.invalid:8476 does not ans"):
        rendezvous.join(place, 1, 10, lambda text: None)
    assert time.monotonic() - begin < 20


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


def test_several_processes_need_no_flag(monkeypatch):
    """They are found in the environment, here that of Slurm."""
    assert rendezvous.detected_processes() == 1
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8476")
    assert rendezvous.detected_processes() == 2
    found = rendezvous.place_of(None, None, None, 1)
    assert found == rendezvous.Place("node001:8476", 2, 1)


@pytest.mark.parametrize(
    ("given", "advice"), [([], "start all of them with --distributed"),
                          (["--nodistributed"], "leave out --nodistributed")],
)  # fmt: skip
def test_processes_that_are_not_connected_are_refused(monkeypatch, given, advice):
    """As on a pod whose processes could not be found in the environment."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    values = flags.FlagValues()
    host_flags.define(values)
    values(["train", *given])
    with pytest.raises(ValueError, match=f"JAX sees 4 processes, which are not .*; {advice}"):
        host_flags.connect(values)


# A job that is nothing but collectives, and what its processes do in the end.
LOOP = """
import sys, time
import jax, numpy as np
from recursive_jax import host_endings, hosts, rendezvous
coordinator, count, number = (flag.partition("=")[2] for flag in sys.argv[1:4])
tell = lambda text: print("error:", text, file=sys.stderr, flush=True)
rendezvous.join(rendezvous.Place(coordinator, int(count), int(number)), 60, 10, tell)
hosts.configure(30, tell, 5)
from jax.experimental import multihost_utils
with host_endings.ending_together(tell, lambda: "; start all again"):
    for step in range(10**9):
        multihost_utils.process_allgather(np.int32(step))
        print("step", step, flush=True)
        if step == 3:
            drifted = {"a": 1, "b": jax.process_index()}
            try:
                hosts.agree(drifted, "the third step")
            except ValueError as error:
                print(error, flush=True)
"""


def loop_until_step_5(number):
    """Two processes that run LOOP, and what process `number` has printed until step 5."""
    processes = local_multiprocess.start(
        2, ["-c", LOOP], cwd=commands.ROOT, env=commands.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines = []
    for line in iter(processes[number].stdout.readline, ""):
        lines.append(line)
        if line == "step 5\n":
            break
    return processes, lines


@pytest.mark.parametrize("dead", [1, 0])
def test_a_process_that_is_killed_ends_the_other(dead):
    """Process 0 runs JAX's coordination service: without it JAX may abort the others itself."""
    processes, lines = loop_until_step_5(dead)
    assert any("b is 0 on process 0" in line and "and 1 on process 1" in line for line in lines)
    begin = time.monotonic()
    processes[dead].send_signal(signal.SIGKILL)
    _, stderr = processes[1 - dead].communicate(timeout=SECONDS)
    assert processes[1 - dead].returncode != 0 and time.monotonic() - begin < SECONDS
    processes[dead].communicate()
    if dead == 1 or processes[1].returncode == 75:
        assert re.search(rf"error: process {dead} of 2.* is gone; start all again", stderr), stderr
    else:
        assert "JAX distributed service detected fatal errors" in stderr


def test_a_process_that_is_stopped_ends_the_other():
    """Process 0, the coordinator, does not answer: a call to it does not return."""
    processes, _ = loop_until_step_5(0)
    processes[0].send_signal(signal.SIGSTOP)
    _, stderr = processes[1].communicate(timeout=SECONDS)
    processes[0].kill()
    processes[0].communicate()
    assert processes[1].returncode == 75
    assert "error: no sign of life from process 0 of 2 for 5 s; start all again" in stderr


def test_the_launcher_passes_output_and_exit_codes_on():
    program = "import sys; print(sys.argv[-1]); sys.exit(int(sys.argv[-1][-1]) * 3)"
    launcher = commands.ROOT / "launch" / "local_multiprocess.py"
    done = subprocess.run(
        [sys.executable, launcher, "2", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == ["--process_id=0", "[1] --process_id=1"]
