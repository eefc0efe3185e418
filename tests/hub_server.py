"""A hub on localhost: the endpoints that the real client calls to upload a folder, and what it sent there."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_" + "T0k3nT0k3n" * 3


class Hub(ThreadingHTTPServer):
    """Knows one user, `tester`, whose token is TOKEN.

    Attributes:
        role: of the token: read or write.
        refuse: endings of paths that are answered by 403.
        repositories: what `create_repo` was asked for.
        files: content by `owner/name/path` of everything committed.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.role, self.refuse = "write", ()
        self.repositories: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(self.path, b"")

    def do_POST(self) -> None:
        self.answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, path: str, body: bytes) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials"})
        if any(ending in path for ending in self.server.refuse):
            return self.send(403, {"error": "Forbidden: you don't have the rights\nsecond line"})
        if path == "/api/whoami-v2":
            access = {"accessToken": {"role": self.server.role}}
            return self.send(200, {"type": "user", "name": "tester", "auth": access})
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.server.repositories.append(asked)
            return self.send(200, {"url": f"{self.server.address}/{asked['organization']}/{asked['name']}"})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        repository = path.removeprefix("/api/models/").rsplit("/", 2)[0]
        if path.endswith("/preupload/main"):
            rows = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.send(200, {"files": rows})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[f"{repository}/{line['value']['path']}"] = content
            commit = {"commitOid": "0" * 40, "commitUrl": f"{self.server.address}/{repository}/commit/0"}
            return self.send(200, commit)
        return self.send(404, {"error": f"no endpoint {path}"})

    def send(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the context lasts."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
