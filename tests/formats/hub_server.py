"""A hub on localhost, as far as an upload goes: it keeps what the real huggingface_hub client commits to it."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """`files` by repository and path; `created` what was asked for; `tokens` with which."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.unknown: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        path, _, _ = path.partition("?")
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"].startswith("refused"):
                return None
            self.created.append(asked)
            return {"url": f"{self.url}/{asked['organization']}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        _, _, kind, owner, name, what, *_ = [*path.split("/"), "", "", ""]
        repository = f"{owner}/{name}"
        if kind == "models" and what == "preupload":
            asked = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
        if kind == "models" and what == "commit":
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    value = operation["value"]
                    content = base64.b64decode(value["content"])
                    self.files.setdefault(repository, {})[value["path"]] = content
            return {"commitUrl": f"{self.url}/{repository}/commit/{'b' * 40}", "commitOid": "b" * 40, "success": True}
        if kind == "models" and what in ("", "revision"):
            return {"id": repository, "sha": "a" * 40, "private": False, "siblings": [], "tags": [], "downloads": 0}
        self.unknown.append(f"{method} {path}")
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("authorization"))
                found = hub.answer(self.command, self.path, body)
                text = json.dumps({"error": "not here"} if found is None else found).encode()
                self.send_response(404 if found is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            do_GET = do_POST = do_HEAD = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler
