"""llama.cpp by way of the package xllamacpp: greedy tokens and token ids of a GGUF file."""

import http.client
import json
import urllib.parse

import pytest


class LlamaCpp:
    """A model of a GGUF file, in stock llama.cpp on one CPU thread.

    Its tests are skipped where xllamacpp is not installed.
    """

    def __init__(self, path, context_length=512, threads=1):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context_length, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity, params.warmup = -1, False
        self.server = xllamacpp.Server(params)  # raises RuntimeError: the file cannot be loaded
        address = urllib.parse.urlsplit(self.server.listening_address)
        self.http = http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def post(self, path, **body):
        headers = {"Content-Type": "application/json"}
        try:
            self.http.request("POST", path, json.dumps(body), headers=headers)
            response = self.http.getresponse()
        except (ConnectionError, http.client.HTTPException):  # closed after seconds without use
            self.http.close()
            self.http.request("POST", path, json.dumps(body), headers=headers)
            response = self.http.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer

    def ids(self, text, special=False):
        """Token ids of a text; `special`: with those that the file puts first."""
        return self.post("/tokenize", content=text, add_special=special, parse_special=True)[
            "tokens"
        ]

    def greedy(self, prompt, count):
        """The ids that follow a prompt (text, or ids), at most `count`, the likeliest each time."""
        answer = self.post(
            "/completion", prompt=prompt, n_predict=count, temperature=0.0, top_k=1,
            cache_prompt=False, return_tokens=True, repeat_penalty=1.0,
        )  # fmt: skip
        return answer["tokens"]
