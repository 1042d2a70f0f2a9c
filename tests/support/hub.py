"""A small server on loopback that speaks enough of the Hub for huggingface_hub and datasets: info, tree, paths, resolve.

It can be made to fail: `faults` names, for the end of a path, what the next downloads of it meet, one after the other.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.folders` and `server.datasets`: repository -> folder. `server.answers`: repository -> (status, headers)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=(), length=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        self.server.seen.append(path)
        self.server.tokens[path] = self.headers.get("Authorization")
        is_api = path.startswith("api/")
        path = path.removeprefix("api/").removeprefix("models/")
        folders = self.server.datasets if path.startswith("datasets/") else self.server.folders
        parts = path.removeprefix("datasets/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.server.answers:
            status, headers = self.server.answers[repo]
            return self.answer(status, b"{}", headers)
        if repo not in folders:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in REVISIONS:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            fault = self.fault(path)
            found = self.listing(repo, folders[repo], rest)
            body, kind = json.dumps(found).encode(), {"Content-Type": "application/json"}
            return self.answer(fault, b"{}", self.server.after) if isinstance(fault, int) else self.answer(200, body, kind)
        return self.file(folders[repo] / "/".join(rest[2:]))

    def fault(self, path):
        for end, waiting in self.server.faults.items():
            if path.endswith(end) and waiting:
                return waiting.pop(0)
        return None

    def listing(self, repo, folder, rest):
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if rest and rest[0] == "paths-info":
            return [self.entry(name, files[name]) for name in self.form.get("paths", []) if name in files]
        if rest and rest[0] == "tree":
            within = "/".join(rest[2:])
            found = {name: path for name, path in files.items() if not within or name.startswith(f"{within}/")}
            deep = "recursive=true" in self.path.lower()
            folders = sorted({n.rsplit("/", 1)[0] for n in found if "/" in n} - {within})
            entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
            at = f"{within}/" if within else ""
            return entries + [self.entry(n, p) for n, p in found.items() if deep or "/" not in n.removeprefix(at)]
        sizes = self.server.sizes
        return {
            "id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": n, "size": sizes.get(n, p.stat().st_size), "blobId": digest(p)[:40]} for n, p in files.items()],
        }  # fmt: skip

    def entry(self, name, path):
        size = path.stat().st_size
        large = {"lfs": {"oid": digest(path), "size": size, "pointerSize": 130}} if name.endswith(LARGE) else {}
        return {"type": "file", "path": name, "size": size, "oid": digest(path)[:40], **large}

    def file(self, path):
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        headers = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
        fault = self.fault(path.name) if self.command == "GET" else None
        if isinstance(fault, int):
            return self.answer(fault, b"{}", self.server.after)
        if fault == "cut":  # in the middle of the body
            self.answer(200, body[: len(body) // 2], headers, length=len(body))
            self.close_connection = True
            return self.connection.close()
        if fault == "changed":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "short":
            body = body[:-7]
        if fault == "elsewhere":
            return self.answer(302, b"", headers | {"Location": f"{self.server.elsewhere}/{path.name}"})
        return self.answer(200, body, headers)


LARGE = (".safetensors", ".parquet", ".bin")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def hub(folders, answers=(), *, datasets=(), faults=(), after=(), sizes=(), elsewhere=None, handler=Handler):
    """Serve repositories; yields the server: its address is `.url`, its requests are in `.seen`, their tokens in `.tokens`.

    `after` are the headers of a failing answer, `sizes` what the Hub claims of a file's size.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.folders, server.datasets, server.answers = dict(folders), dict(datasets), dict(answers)
    server.faults = {end: list(waiting) for end, waiting in dict(faults).items()}
    server.after, server.sizes, server.elsewhere = dict(after), dict(sizes), elsewhere
    server.seen, server.tokens = [], {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def on_hub(url, home, work, **constants):
    """The work of a child that sees this server as the Hub, with a cache of its own under `home`.

    huggingface_hub reads its environment when it is imported; a forked child has it imported already.
    """

    def there():
        from datasets import config
        from huggingface_hub import constants as found

        values = {
            "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"), "HF_XET_CACHE": str(home / "xet"), **constants,
        }  # fmt: skip
        for name, value in values.items():
            setattr(found, name, value)
        config.HF_ENDPOINT, config.HUB_DATASETS_URL = url, url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE = home / "datasets", values["HF_HUB_OFFLINE"]
        config.HF_MODULES_CACHE = str(home / "modules")
        work()

    return there
