"""A server for tests: random weights, two loops, the tokenizer of the embedded model."""

import contextlib
import functools
import http.client
import json
import threading

import jax
import numpy as np

from recursive_jax import generation, serve, sharding, text
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.exit_measures import TopProbability
from recursive_jax.model import Model
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.serving.limits import ServerLimits
from recursive_jax.serving.server import address, bind
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights

CFG = DecoderConfig(
    family="llama", vocab_size=4096, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=8, num_layers=1, num_loops=2, norms="per_loop", lora_ranks=dict(q=2, down=3),
    max_length=96,
)  # fmt: skip
LIMITS = ServerLimits(max_body_bytes=20_000, max_choices=8, max_queue=6, max_seconds=20)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def params(seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 0.5 if leaf.ndim > 1 else 1.0
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, abstract_params(CFG))


@functools.cache
def model():
    tokenizer = text.load_tokenizer(ASSETS / "tiny")
    tokenizer.chat_template = TEMPLATE
    return Model(CFG, tokenizer, ArrayWeights(params(), "random"), "random")


@functools.cache
def placed():
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    return generation.put_on_devices(model(), mesh, np.float32, 64)


@functools.cache
def engine(number=0):
    """An engine with two slots in which tokens leave early; `number`: another one like it."""
    config = EngineConfig(num_slots=2, measure=TopProbability(0.002), num_stop=20)
    return generation.make_engine(placed(), config)


@contextlib.contextmanager
def running(made, **changes):
    """The URL of a server, which runs in a thread."""
    server = serve.make_server(made, model(), placed(), "tiny", changes.pop("limits", LIMITS))
    ready = threading.Event()
    server.warmed = ready.set
    for name, value in changes.items():
        setattr(server, name, value)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=(listener,))
        thread.start()
        try:
            assert ready.wait(30)
            yield address(listener)
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()


def connect(url):
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)


def call(url, path, body=None, method=None, **headers):
    """(status, JSON) of one request; `body` is JSON, or bytes as they are."""
    connection = connect(url)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {} if data is None else {"Content-Type": "application/json"}
    method = method or ("GET" if data is None else "POST")
    connection.request(method, path, data, kind | headers)
    answer = connection.getresponse()
    found = answer.read().decode()
    connection.close()
    return answer.status, json.loads(found) if found.startswith("{") else found
