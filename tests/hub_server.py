"""A Hugging Face hub on loopback, as far as its client asks when it downloads a repository.

    python tests/hub_server.py someone/a-model=DIR [...]     prints its address, then serves

Then: HF_ENDPOINT=ADDRESS python -m recursive_jax.convert --source=someone/a-model --out=CKPT
"""

import hashlib
import http.server
import json
import pathlib
import re
import sys
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(repos):
    """A server, in a thread of its own, of `{hub id: directory}`; its `asked` lists the paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            path = self.path.split("?")[0].strip("/")
            for repo, directory in repos.items():
                files = sorted(p for p in pathlib.Path(directory).rglob("*") if p.is_file())
                if re.fullmatch(rf"api/models/{repo}(/revision/\w+)?", path):
                    names = [{"rfilename": str(f.relative_to(directory))} for f in files]
                    return self._answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": names}))
                if re.fullmatch(rf"api/models/{repo}/tree/\w+", path):
                    return self._answer(json.dumps([self._entry(directory, f) for f in files]))
                found = re.fullmatch(rf"{repo}/resolve/\w+/(.+)", path)
                if found and (pathlib.Path(directory) / found[1]).is_file():
                    return self._answer((pathlib.Path(directory) / found[1]).read_bytes())
            missing = "RepoNotFound" if path.startswith("api/") else "EntryNotFound"
            return self._answer("", 404, {"X-Error-Code": missing})

        do_HEAD = do_GET

        def _entry(self, directory, file):
            data = file.read_bytes()
            name, oid = str(file.relative_to(directory)), hashlib.sha1(data).hexdigest()
            return {"type": "file", "path": name, "size": len(data), "oid": oid}

        def _answer(self, body, status=200, headers=None):
            body = body if isinstance(body, bytes) else body.encode()
            self.send_response(status)
            etag = hashlib.sha1(body).hexdigest()
            known = {"Content-Length": len(body), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            for name, value in (known | (headers or {})).items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    running = serve(dict(pair.split("=", 1) for pair in sys.argv[1:]))
    print(f"http://127.0.0.1:{running.server_port}", flush=True)
    threading.Event().wait()
