"""Good requests among hostile ones: none may be lost or changed, and no mistake is a 500.

    python -m recursive_jax.serve --checkpoint=tiny --context_length=256 --port=8000 & PID=$!
    python tests/benchmarks/serve_hostile.py --port=8000 --pid=$PID --requests=10000 --hostile=0.1

Prints one JSON row. `lost` and `changed` count good requests without an answer, and with another
one than the server gave before any hostile request.
"""

import argparse
import collections
import concurrent.futures
import http.client
import json
import pathlib
import random
import re
import socket
import time

PATH = "/v1/completions"
PROMPTS = ["Return a new", "Raise an error", "The list", "x = 1", "Parameters: x, an array of"]


def memory_mb(pid):
    """Resident memory of a process, in MB."""
    if pid is None:
        return None
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1)


def post(port, data, timeout=120, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", PATH, data, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def good(port, number):
    """(status, text) of a good request."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 8, "temperature": 0}
    if number % 2:
        body |= {"temperature": 0.8, "seed": number % 10}
    status, found = post(port, json.dumps(body))
    return status, json.loads(found)["choices"][0]["text"] if status == 200 else found


def body(**changes):
    return json.dumps({"prompt": "a", "max_tokens": 2} | changes).encode()


def bodies(rng):
    """A body that is a client's mistake."""
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    return rng.choice([
        lambda: noise,
        lambda: body()[: rng.randrange(1, 20)],
        lambda: b"[" * 100_000,
        lambda: b'{"a":' * 50_000,
        lambda: b" " * (10 << 20),
        lambda: body(prompt="a" * (10 << 20)),
        lambda: body(prompt=["a"] * 10_000),
        lambda: body(prompt=[[1]] * 10_000),
        lambda: body(n=10**9),
        lambda: body(n=10**30),
        lambda: body(stop=["a"] * 10_000),
        lambda: body(stop=["a" * 100_000]),
        lambda: body(stop=""),
        lambda: body(stop=["<|eos|>b"]),
        lambda: b'{"prompt": "a", "temperature": NaN}',
        lambda: b'{"prompt": "a", "top_p": -Infinity}',
        lambda: body(temperature=1e308),
        lambda: b'{"prompt": "a", "min_p": 1e999}',
        lambda: b'{"prompt": "\\ud800 \\udfff"}',
        lambda: b'{"prompt": "\xed\xa0\x80"}',
        lambda: body(prompt=[10**12]),
        lambda: body(prompt=[-5]),
        lambda: body(max_tokens=10**9),
        lambda: body(max_tokens=-1),
        lambda: body(seed=2**64),
        lambda: body(logprobs=10**6),
        lambda: body(stream="yes"),
        lambda: body(**{f"x{k}": k for k in range(2000)}),
        lambda: body(**{"k" * 100_000: 1}),
        lambda: body(max_loops=10**9),
        lambda: body(tools=[{"type": "function"}]),
    ])()  # fmt: skip


def mistake(port, rng):
    return post(port, bodies(rng))[0]


def control_characters(port, rng):
    """No mistake: any text is a prompt."""
    text = "".join(chr(rng.randrange(1, 0x2FF)) for _ in range(20)) + "\u202e\ufeff\U0001f9ff"
    return post(port, body(prompt=text, stop=["\x00", "\u202e"]))[0]


def raw(port, data, wait=0.0):
    """Send bytes, and leave after `wait` seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(data)
            time.sleep(wait)
        except OSError:
            return "refused"
    return "left"


def vanish(port, rng):
    """A client that goes away at a random moment, in a request or in a stream."""
    stream = body(max_tokens=100, stream=rng.random() < 0.5, n=rng.randrange(1, 4))
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = head.encode() + b"Content-Length: %d\r\n\r\n" % len(stream) + stream
    cut = len(data) if rng.random() < 0.7 else rng.randrange(len(data))
    return raw(port, data[:cut], rng.random() * 0.3)


def flood(port, rng):
    """More headers than anyone sends."""
    lines = b"".join(b"X-%d: %s\r\n" % (k, b"a" * 1000) for k in range(500))
    return raw(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n")


def slow_reader(port, rng):
    """A client that reads a stream a little at a time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sent = body(max_tokens=20, stream=True, ignore_eos=True)
    connection.request("POST", PATH, sent, {"Content-Type": "application/json"})
    answer, found = connection.getresponse(), b""
    while part := answer.read1(100):
        found += part
        time.sleep(0.005)
    connection.close()
    return answer.status if b"[DONE]" in found else "broken"


HOSTILE = [mistake] * 6 + [control_characters, vanish, vanish, flood, slow_reader]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hostile", type=float, default=0.1)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    kinds = range(2 * len(PROMPTS))
    expected = {n: good(options.port, n) for n in kinds}
    before, began = memory_mb(options.pid), time.perf_counter()
    counts = collections.Counter()

    def one(number):
        rng = random.Random(number)
        if rng.random() < options.hostile:
            kind = rng.choice(HOSTILE)
            try:
                return f"{kind.__name__} {kind(options.port, rng)}"
            except OSError:  # the server closed the connection before it read everything
                return f"{kind.__name__} closed"
        try:
            status, text = good(options.port, number)
        except OSError as error:
            return f"lost {error!r}"
        if status != 200:
            return f"lost {status}"
        return "good" if (status, text) == expected[number % len(kinds)] else "changed"

    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        counts.update(pool.map(one, range(options.requests)))
    row = {
        "benchmark": "serve_hostile",
        "requests": options.requests,
        "good": counts["good"],
        "lost": sum(v for k, v in counts.items() if k.startswith("lost")),
        "changed": counts["changed"],
        "server_errors": sum(v for k, v in counts.items() if re.search(r" 5\d\d$", k)),
        "memory_mb": [before, memory_mb(options.pid)],
        "seconds": round(time.perf_counter() - began, 1),
        "ends": dict(sorted(counts.items())),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
