"""A hub on this machine: what huggingface_hub asks for when files are pushed, listed and fetched, over HTTP.

Repositories are dictionaries in memory; every request is recorded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """repositories: name -> file -> content. requests: method and path of each, in order. private: of what was made."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}
        self.commits: list[list[str]] = []
        self.refuses = False
        self.url = ""

    def sha(self, repository: str) -> str:
        """What stands for the commit that a repository is at."""
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted((name, hash_of(data)) for name, data in files.items())).encode()).hexdigest()


def hash_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        if self.hub.refuses:
            return self.answer({"error": "no"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "user", asked["name"]]))
            self.hub.repositories.setdefault(name, {".gitattributes": b""})
            self.hub.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            return self.answer({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":  # of a card
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+?/.+?)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self.answer({"files": modes})
        if match := re.fullmatch(r"/api/models/(.+?/.+?)/commit/main", path):
            files = self.hub.repositories[match[1]]
            changed = []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    changed.append(value["path"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                    changed.append(f"-{value['path']}")
            self.hub.commits.append(changed)
            sha = self.hub.sha(match[1])
            return self.answer({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{sha}", "commitOid": sha})
        return self.answer({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if match[1] in self.hub.repositories:
                siblings = [{"rfilename": name} for name in sorted(self.hub.repositories[match[1]])]
                return self.answer({"id": match[1], "sha": self.hub.sha(match[1]), "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
            files = self.hub.repositories[match[1]].items()
            rows = [{"type": "file", "path": name, "size": len(data), "oid": hash_of(data)} for name, data in files]
            return self.answer(rows)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.hub.repositories.get(match[1], {}).get(match[2])
            if data is not None:
                headers = {"etag": f'"{hash_of(data)}"', "x-repo-commit": self.hub.sha(match[1])}
                return self.send(data, 200, headers)
        return self.answer({"error": "not found"}, 404, {"x-error-code": "RepoNotFound"})

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"content-type": "application/json", **(headers or {})})

    def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own within the block, with this folder as its cache."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
