"""A small server on loopback that speaks enough of the Hub for huggingface_hub: model info, tree, resolve."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.folders`: repository -> folder; `server.answers`: repository -> (status, headers) instead."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        self.server.seen.append(path)
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.server.answers:
            status, headers = self.server.answers[repo]
            return self.answer(status, b"{}", headers)
        folder = self.server.folders.get(repo)
        if folder is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return self.answer(200, json.dumps(self.listing(repo, folder, rest)).encode(), {"Content-Type": "application/json"})
        return self.file(folder / "/".join(rest[2:]))

    def listing(self, repo, folder, rest):
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        names = [p.relative_to(folder).as_posix() for p in files]
        if rest and rest[0] == "tree":
            return [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": digest(p)[:40]}
                for n, p in zip(names, files, strict=True)
            ]
        return {
            "id": repo,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": n} for n in names],
        }

    def file(self, path):
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer(
            200, path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
        )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def hub(folders, answers=()):
    """Serve repositories; yields the server, whose address is `.url` and whose requests are in `.seen`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folders, server.answers, server.seen = dict(folders), dict(answers), []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
