"""Command lines of jobs, run in forked children of one process that has imported what jobs import.

A child is the job's own program, `python -m recursive_jax.JOB`, without seconds of imports.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]

SERVER = """
import json, os, runpy, sys
import flax, grain, jax, ml_collections, optax, transformers, tensorboardX
from orbax.checkpoint import v1
import recursive_jax.console.app, recursive_jax.evaluation.perplexity, recursive_jax.training.setup
import recursive_jax.fit, recursive_jax.generation, recursive_jax.start, recursive_jax.text
recursive_jax.text.load_tokenizer(recursive_jax.weights.source.ASSETS / "tiny")  # lazy imports
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(status, flush=True)
        continue
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{case['log']}/{name}", os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [case["job"], *case["argv"]]
    code = 0
    try:
        runpy.run_module(f"recursive_jax.{case['job']}", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    with open(f"{case['log']}/code", "w") as f:
        f.write(str(code))
    os._exit(0)
"""


def environment(quick=True):
    """The environment of a command: one CPU device; by default it compiles quickly, as most tests.

    Not `quick`: as users compile, by their code generator and with all optimisations.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST")}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return env | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"} if quick else env


@functools.cache
def server():
    """The process that forks; one for all tests of this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)  # end of input ends it
    return process


def run(job, *arguments):
    """The CompletedProcess of `python -m recursive_jax.JOB ARGUMENTS`."""
    argv = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as log:
        case = {"job": job, "argv": argv, "log": log}
        server().stdin.write(json.dumps(case) + "\n")
        server().stdin.flush()
        status = server().stdout.readline()
        assert status == "0\n", f"the process of {job} {argv} ended with status {status!r}"
        code, out, err = (pathlib.Path(log, x).read_text() for x in ("code", "stdout", "stderr"))
    return subprocess.CompletedProcess([job, *argv], int(code), out, err)
