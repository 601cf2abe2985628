"""Faults of training runs with several processes on this machine; one JSON row for each.

    python -m tests.benchmarks.host_faults [--cases=absent,differ,stop,…] [--kills=20] \\
        [--terminations=5] [--out=ROWS.jsonl] [--seed=0]

kill       SIGKILL to a random process at a random moment; the same command goes on
terminate  SIGTERM to a random process; all save at one step and end with code 75
stop       SIGSTOP to one process: the other ends within its timeout
absent     one process is never started
differ     two processes with another seed, learning rate, text, source, workdir
counts     1, 2 and 4 processes: losses, and peak memory of each
resize     1 -> 2 -> 4 -> 1 processes, each stopped by SIGTERM, against a run of 1 process

Every process is a fork of this one, which has imported what training imports. The final weights
and losses of interrupted runs are compared with those of a run that nothing has disturbed.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import local_multiprocess  # noqa: E402

ROWS, LENGTH, STEPS = 4, 16, 16
CONFIG = (
    *("--config=tiny_smoke", "--config.model.lora_rank=0", "--config.model.lora_init=none"),
    *("--config.objective.kd=0", "--config.checkpoint_every=2"),
)
TIMEOUTS = {"initialization_timeout": 20, "heartbeat_timeout": 15, "host_timeout": 40}
SLACK = 30  # seconds beyond a timeout: this machine may be busy
IMPORTED = (
    *("flax", "grain", "jax", "optax", "tensorboardX", "transformers"),
    *("recursive_jax.console.app", "recursive_jax.fit", "recursive_jax.start"),
)
CASES = ("absent", "differ", "stop", "terminate", "kill", "counts", "resize")


class Job:
    """The processes of a run; each is a fork that runs `recursive_jax.train`."""

    def __init__(self, place, count=2, steps=STEPS, own=None, only=None, workdir="run"):
        self.logs, self.ids, self.ends = {}, {}, {}
        self.began = time.monotonic()
        for number, flags in enumerate(local_multiprocess.places(count)):
            if only is not None and number not in only:
                continue
            argv = [
                *CONFIG, f"--workdir={place / workdir}",
                f"--config.data.cache_dir={place / 'cache'}", f"--config.data.batch_size={ROWS}",
                f"--config.data.context_length={LENGTH}", "--config.data.eval_tokens=64",
                f"--config.tokens={steps * ROWS * LENGTH}", "--config.eval_every=100000",
                *(f"--{k}={v}" for k, v in TIMEOUTS.items()),
                *(flags if count > 1 else []), *(own or {}).get(number, ()),
            ]  # fmt: skip
            log = self.logs[number] = pathlib.Path(tempfile.mkdtemp(dir=place, prefix="log"))
            for name in ("stdout", "stderr"):
                (log / name).touch()  # they are read before the process has begun
            self.ids[number] = os.fork()
            if not self.ids[number]:
                run(argv, log)

    def poll(self):
        """Whether all processes have ended."""
        for number in self.ids.keys() - self.ends.keys():
            ended, status, usage = os.wait4(self.ids[number], os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                self.ends[number] = code, time.monotonic() - self.began, usage.ru_maxrss / 1024
        return len(self.ends) == len(self.ids)

    def wait(self, seconds=600):
        """Wait for the end; processes that are still there are killed and have no exit code."""
        deadline = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in self.ids.keys() - self.ends.keys():
            os.kill(self.ids[number], signal.SIGKILL)
            os.waitpid(self.ids[number], 0)
        return self

    def send(self, number, what):
        if number not in self.ends:
            os.kill(self.ids[number], what)

    def out(self, number, name="stdout"):
        return (self.logs[number] / name).read_text(errors="replace")

    def wait_for(self, text, seconds=600):
        """Return when process 0 has printed `text` or has ended."""
        deadline = time.monotonic() + seconds
        while text not in self.out(0) and not self.poll() and time.monotonic() < deadline:
            time.sleep(0.05)

    def row(self, case, **more):
        numbers = sorted(self.ids)
        texts = {n: f"{self.out(n, 'stderr')}\n{self.out(n)}".strip() for n in numbers}
        lines = {n: text.splitlines() for n, text in texts.items()}
        errors = {n: [x for x in found if x.startswith("error: ")] for n, found in lines.items()}
        return {
            "case": case,
            "exit_codes": {n: self.ends.get(n, [None])[0] for n in numbers},
            "seconds": round(time.monotonic() - self.began, 1),
            "last_lines": {n: (errors[n] or lines[n] or ["-"])[-1][:400] for n in numbers},
            **more,
        }

    def tells(self, number, pattern):
        """Whether process `number` printed an error line that has the pattern."""
        return bool(re.search(rf"(?m)^error: .*{pattern}", self.out(number, "stderr")))


def run(argv, log):
    """Become a process that trains."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(log / name, os.O_WRONLY), number)
    os.setpgid(0, 0)
    sys.argv, code = ["train", *argv], 0
    try:
        runpy.run_module("recursive_jax.train", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    import jax

    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(code)


def saved_steps(workdir):
    """The names of the steps that are complete."""
    return [p.parent.name for p in workdir.glob("checkpoints/*/_CHECKPOINT_METADATA")
            if p.parent.name.isdigit()]  # fmt: skip


def result(workdir):
    """Checksums of the last step, and the losses by step."""
    file = workdir / "checkpoints" / max(saved_steps(workdir), key=int)
    metadata = json.loads((file / "_CHECKPOINT_METADATA").read_text())
    sums = find(metadata, "checksums")
    losses = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name in ("train/loss", "train/grad_norm", "valid/nll"):
            if name in values:
                losses[name, values["step"]] = values[name]
    return {k: v for k, v in sums.items() if k != "progress"}, losses, int(file.name)


def find(tree, name):
    if isinstance(tree, dict):
        if name in tree:
            return tree[name]
        return next((x for x in (find(v, name) for v in tree.values()) if x is not None), None)


def compare(found, wanted):
    """How a run differs from another one."""
    keys = found[1].keys() | wanted[1].keys()
    apart = [
        abs(found[1][k] - wanted[1][k]) / abs(wanted[1][k])
        for k in found[1].keys() & wanted[1].keys()
    ]
    return {
        "weights_equal": found[0] == wanted[0],
        "metrics_equal": found[1] == wanted[1],
        "records_missing": len(keys) - len(apart),
        "largest_relative_difference": max(apart),
    }


@functools.cache
def undisturbed(count=2):
    """A run that nothing disturbs: its row, the ends of its processes, and its result."""
    with tempfile.TemporaryDirectory() as place:
        job = Job(pathlib.Path(place), count).wait()
        assert {end[0] for end in job.ends.values()} == {0}, job.row("undisturbed")
        return job.row(f"{count} processes"), job.ends, result(pathlib.Path(place) / "run")


def absent(place, options):
    for only in (0, 1):
        job = Job(place, only=[only]).wait(TIMEOUTS["initialization_timeout"] + SLACK)
        pattern = "missing: process 1" if only == 0 else "process 0 at localhost:"
        yield job.row(f"process {1 - only} never comes", told_by_name=job.tells(only, pattern))


def differ(place, options):
    (place / "a").mkdir()
    for name in ("text1", "text2"):
        text = "\n".join(f"{name} {n} and more words " * 5 for n in range(200))
        (place / f"{name}.txt").write_text(text)
    source = place / "source"
    assets = ROOT / "recursive_jax" / "assets" / "tiny"
    shutil.copytree(assets, source)
    from safetensors import numpy as safetensors

    file = next(source.glob("*.safetensors"))
    arrays = safetensors.load_file(file)
    name = max(arrays, key=lambda n: arrays[n].size)
    arrays[name] = arrays[name] + arrays[name].dtype.type(1)
    safetensors.save_file(arrays, file, {"format": "pt"})
    texts = [[f"--config.data.train={place / n}.txt"] for n in ("text1", "text2")]
    cases = {
        "seed": ([], ["--config.seed=5"], "config.seed is "),
        "learning rate": ([], ["--config.optimizer.learning_rate=0.1"], "learning_rate is "),
        "text": (*texts, "training text is "),
        "source": ([], [f"--config.source={source}"], r"source \(content\) is "),
        "workdir": ([], [f"--workdir={place / 'a' / 'other'}"], "process 1 of 2 .*other"),
    }
    for name, (first, second, pattern) in cases.items():
        job = Job(place, own={0: first, 1: second}).wait(TIMEOUTS["host_timeout"] + SLACK)
        told = all(job.tells(n, pattern) and job.tells(n, "process 1 of 2") for n in (0, 1))
        clean = not (place / "run").exists()
        yield job.row(f"another {name}", told_by_name=told, nothing_written=clean)


def stop(place, options):
    for stopped in (1, 0):
        job, other = Job(place, workdir=f"stop{stopped}"), 1 - stopped
        job.wait_for("step 4/")
        job.send(stopped, signal.SIGSTOP)
        began = time.monotonic()
        while other not in job.ends and time.monotonic() - began < sum(TIMEOUTS.values()) + SLACK:
            job.poll()
            time.sleep(0.05)
        took = round(time.monotonic() - began, 1)
        job.send(stopped, signal.SIGKILL)
        job.wait(5)
        text = job.out(other, "stderr")
        yield job.row(
            f"SIGSTOP to process {stopped}", seconds_after=took, within_timeout=other in job.ends,
            told_by_name=job.tells(other, f"process {stopped} of 2"),
            told_by_jax=f"task:{stopped}" in text or "distributed service detected fatal" in text,
        )  # fmt: skip


def last_saved(workdir):
    return max(map(int, saved_steps(workdir)), default=0)


def terminate(place, options):
    chance = random.Random(options.seed)
    _, _, wanted = undisturbed()
    runs, stopped = 0, 0
    while stopped < options.terminations:
        name = f"term{runs}"
        job, who = Job(place, workdir=name), chance.randrange(2)
        job.wait_for(f"step {last_saved(place / name) + 1}/")
        job.send(who, signal.SIGTERM)
        job.wait()
        codes, step = {end[0] for end in job.ends.values()}, last_saved(place / name)
        if codes == {0}:  # it was done already
            runs += 1
            yield job.row("done after SIGTERM", **compare(result(place / name), wanted))
            continue
        stopped += 1
        yield job.row(f"SIGTERM to process {who}", all_saved=codes == {75}, saved_step=step)
    job = Job(place, workdir=f"term{runs}").wait()
    yield job.row("resumed after SIGTERM", **compare(result(place / f"term{runs}"), wanted))


def kill(place, options):
    chance = random.Random(options.seed)
    _, _, wanted = undisturbed()
    runs, killed = 0, 0
    while killed < options.kills:
        # A moment before one of the next steps: the times depend on what else this machine does.
        name = f"kill{runs}"
        saved = last_saved(place / name)
        job, who = Job(place, workdir=name), chance.randrange(2)
        step = saved + chance.randrange(4)
        if step > saved:
            job.wait_for(f"step {step}/")
        time.sleep(chance.random() * (4 if step == saved else 0.3))
        job.send(who, signal.SIGKILL)
        began = time.monotonic()
        job.wait(sum(TIMEOUTS.values()) + SLACK)
        took, other = round(time.monotonic() - began, 1), 1 - who
        if {end[0] for end in job.ends.values()} == {0}:  # it was done already
            runs += 1
            yield job.row("done after SIGKILL", **compare(result(place / name), wanted))
            continue
        killed += 1
        yield job.row(
            f"SIGKILL to process {who}", steps_seen=step, seconds_after=took,
            within_timeout=other in job.ends, told_by_name=job.tells(other, f"process {who}\\b"),
            told_by_jax="distributed service detected fatal" in job.out(other, "stderr"),
            saved_step=last_saved(place / name),
        )  # fmt: skip
    job = Job(place, workdir=f"kill{runs}").wait()
    yield job.row("resumed after SIGKILL", **compare(result(place / f"kill{runs}"), wanted))


def counts(place, options):
    first = None
    for count in (1, 2, 4):
        row, ends, found = undisturbed(count)
        first = first or found
        peak = {n: round(end[2]) for n, end in sorted(ends.items())}
        yield {**row, "peak_mb": peak, **compare(found, first)}


def resize(place, options):
    _, _, wanted = undisturbed(1)
    for count in (1, 2, 4):
        job = Job(place, count, workdir="resize")
        job.wait_for(f"step {last_saved(place / 'resize') + 1}/")
        job.send(count - 1, signal.SIGTERM)
        job.wait()
        yield job.row(f"{count} processes, stopped", saved_step=last_saved(place / "resize"))
    job = Job(place, 1, workdir="resize").wait()
    yield job.row("1 -> 2 -> 4 -> 1 processes", **compare(result(place / "resize"), wanted))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terminations", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=os.devnull)
    options = parser.parse_args()
    os.chdir(ROOT)
    cache = tempfile.mkdtemp()  # of compiled programs: hundreds of starts need them
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    for module in IMPORTED:
        importlib.import_module(module)
    from orbax.checkpoint import v1  # noqa: F401

    with open(options.out, "a") as out:
        for case in options.cases.split(","):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
                for row in globals()[case](pathlib.Path(place), options):
                    line = json.dumps(row)
                    print(line, flush=True)
                    out.write(line + "\n")
                    out.flush()
    shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
