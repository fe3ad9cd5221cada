"""A stand-in of the hub's HTTP interface for uploads: repositories in memory, and what was asked with which token."""

import base64
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What the server holds. ``refuse``: HTTP status that answers every request; 0: none."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    refuse: int = 0
    url: str = ""


@contextmanager
def hub_server(monkeypatch, token="hf_secret"):
    """Serve a hub, and point huggingface_hub at it with a token."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of ``create_repo`` and ``upload_folder``."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").split("/revision")[0]
        if name not in self.hub.repositories:
            return self._answer({"error": "Repository not found"}, 404)
        files = [{"rfilename": file} for file in self.hub.repositories[name]]
        return self._answer({"id": name, "sha": "0" * 40, "siblings": files, "private": True, "tags": []})

    def do_POST(self):
        hub, body = self.hub, self._body()
        hub.tokens.append(self.headers.get("Authorization", ""))
        if hub.refuse:
            return self._answer({"error": "no rights"}, hub.refuse)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.repositories:
                return self._answer({"url": f"{hub.url}/{name}", "error": "exists"}, 409)
            hub.repositories[name], hub.private[name] = {}, asked.get("private") or asked.get("visibility") == "private"
            return self._answer({"url": f"{hub.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer({"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                hub.messages.append(entry["value"]["summary"])
            if entry["key"] == "file":
                hub.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer(
            {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}",
                "hookOutput": "",
            }
        )
