"""Command lines of jobs, run in forked children of one process that has imported what jobs import.

A child is the job's own program, `python -m recursive_jax.JOB`, without seconds of imports.
"""

import atexit
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "launch"))  # local_multiprocess

# How XLA compiles what runs a few times only. The older code generator of jaxlib 0.10 needs half of
# the time, and a program that is not cut for several threads a fifth less. A later jaxlib has the
# newer generator only; the tests of Python 3.12 see it.
QUICK_FLAGS = {}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_FLAGS["xla_cpu_use_fusion_emitters"] = "false"
    QUICK_FLAGS["xla_cpu_parallel_codegen_split_count"] = "1"

SERVER = """
import json, os, runpy, sys
import flax, grain, jax, ml_collections, optax, transformers, tensorboardX
from orbax.checkpoint import v1
import recursive_jax.console.app, recursive_jax.evaluation.perplexity, recursive_jax.training.setup
import recursive_jax.fit, recursive_jax.generation, recursive_jax.start, recursive_jax.text
recursive_jax.text.load_tokenizer(recursive_jax.weights.source.ASSETS / "tiny")  # lazy imports
for line in sys.stdin:
    cases = json.loads(line)
    for case in cases:
        case["child"] = os.fork()
        if not case["child"]:
            break
    else:
        ends = [os.waitpid(case["child"], 0)[1] for case in cases]
        print(*map(os.waitstatus_to_exitcode, ends), flush=True)
        continue
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{case['log']}/{name}", os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(case["env"])
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
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(code)
"""


def with_flags(given, flags):
    """XLA_FLAGS with `flags`; those that are given stay as they are."""
    return " ".join([given, *(f"--{k}={v}" for k, v in flags.items() if k not in given)])


def environment():
    """The environment of a command: one CPU device, and it compiles quickly, as most tests."""
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return env | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": with_flags("", QUICK_FLAGS),
    }


@functools.cache
def server():
    """The process that forks; one for all tests of this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)  # end of input ends it
    return process


def run(job, *arguments, **env):
    """The CompletedProcess of `python -m recursive_jax.JOB ARGUMENTS`; `env`: more environment."""
    return run_together(job, [arguments], **env)[0]


def run_together(job, commands, **env):
    """The CompletedProcesses of one job with several lists of arguments, all at the same time."""
    with contextlib.ExitStack() as stack:
        cases = [
            {"job": job, "argv": [str(a) for a in arguments], "env": env,
             "log": stack.enter_context(tempfile.TemporaryDirectory())}
            for arguments in commands
        ]  # fmt: skip
        server().stdin.write(json.dumps(cases) + "\n")
        server().stdin.flush()
        codes = [int(code) for code in server().stdout.readline().split()]
        assert len(codes) == len(cases) and min(codes) >= 0, f"{job} {cases} ended with {codes}"
        return [_ended(case, code) for case, code in zip(cases, codes, strict=True)]


def _ended(case, code):
    out, err = (pathlib.Path(case["log"], name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([case["job"], *case["argv"]], code, out, err)
