"""A loopback Hub that can be written to: new repositories, uploads of large files, commits, pull requests.

A repository is a folder, and its state is what lies in it. A pull request is a folder of its own. `faults` names, for a kind
of request (create, preupload, batch, upload, commit, discussions), what the next ones meet: a status, or "cut" for a
connection that breaks off; "lost" is a commit that is made and whose answer never arrives.
"""

import base64
import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from hub import COMMIT, LARGE, Handler, digest, hub

TOKEN = "hf_markedTokenThatMustShowNowhere"
NEXT = "f" * 40  # the commit that a push makes


class WritableHandler(Handler):
    """Also answers what writes. `server.made` lists the new repositories, `server.commits` and `server.requests` what came."""

    def do_POST(self):
        self.respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self):
        self.respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        if path.endswith("/discussions"):
            return self.respond(b"")
        pulled = path.partition("/revision/refs/pr/")
        if pulled[1]:
            folder = self.server.requests[int(pulled[2]) - 1]["folder"]
            return self.as_json(self.listing(pulled[0].removeprefix("api/models/"), folder, []))
        return super().do_GET()

    def listing(self, repo, folder, rest):
        found = super().listing(repo, folder, rest)
        for sibling in found["siblings"] if isinstance(found, dict) else ():
            if sibling["rfilename"].endswith(LARGE):
                size = (folder / sibling["rfilename"]).stat().st_size
                sibling["lfs"] = {"sha256": digest(folder / sibling["rfilename"]), "size": size, "pointerSize": 130}
        return found | {"sha": self.server.commit_of(repo)} if isinstance(found, dict) else found

    def respond(self, body):
        path = unquote(urlparse(self.path).path).strip("/")
        self.server.seen.append(path)
        self.server.tokens[path] = self.headers.get("Authorization")
        kind = next(kind for end, kind in KINDS.items() if end in f"/{path}")
        fault = self.server.faults[kind].pop(0) if self.server.faults.get(kind) else None
        if isinstance(fault, int):
            return self.answer(fault, b"{}", self.server.after)
        if fault == "cut":
            self.close_connection = True
            return self.connection.close()
        found = getattr(self, kind)(path.removeprefix("api/models/"), body)
        if fault == "lost":
            self.close_connection = True
            return self.connection.close()
        return self.as_json(found)

    def as_json(self, found):
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def create(self, path, body):
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        self.server.made[repo] = asked
        self.server.folders[repo] = self.server.place / "repositories" / repo
        self.server.folders[repo].mkdir(parents=True)
        return {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}

    def validate(self, path, body):
        return {"errors": [], "warnings": []}

    def preupload(self, path, body):
        names = [file["path"] for file in json.loads(body)["files"]]
        return {
            "files": [
                {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
                for name in names
            ]
        }

    def batch(self, path, body):
        objects = []
        for file in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/upload/{file['oid']}"}}}
            objects.append({**file, **({} if file["oid"] in self.server.objects else upload)})
        return {"transfer": "basic", "objects": objects}

    def upload(self, path, body):
        assert hashlib.sha256(body).hexdigest() == path.split("/")[-1]
        self.server.objects[path.split("/")[-1]] = body
        return {}

    def discussions(self, path, body):
        repo = path.removesuffix("/discussions")
        found = [
            {"title": request["summary"], "num": number, "author": {"name": "ci"}, "createdAt": "2026-01-01T00:00:00.000Z",
             "status": "open", "repo": {"name": repo, "type": "model"}, "isPullRequest": True}
            for number, request in enumerate(self.server.requests, 1)
        ]  # fmt: skip
        return {"count": len(found), "start": 0, "discussions": found}

    def commit(self, path, body):
        repo = path.split("/commit/")[0]
        lines = [json.loads(line) for line in body.splitlines()]
        made = lines[0]["value"] | {"repo": repo, "files": [line["value"]["path"] for line in lines[1:]]}
        requested = "create_pr" in parse_qs(urlparse(self.path).query)
        folder = self.server.folders[repo]
        if requested:
            folder = self.server.place / f"request-{len(self.server.requests) + 1}"
            shutil.copytree(self.server.folders[repo], folder)
        for line in lines[1:]:
            target = folder / line["value"]["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            large = line["key"] == "lfsFile"
            content = self.server.objects[line["value"]["oid"]] if large else base64.b64decode(line["value"]["content"])
            target.write_bytes(content)
        (self.server.requests if requested else self.server.commits).append(made | {"folder": folder})
        pull = f"{self.server.url}/{repo}/discussions/{len(self.server.requests)}" if requested else None
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{NEXT}", "commitOid": NEXT, "pullRequestUrl": pull}


KINDS = {
    "/repos/create": "create", "/validate-yaml": "validate", "/preupload/": "preupload", "/objects/batch": "batch",
    "/upload/": "upload", "/discussions": "discussions", "/commit/": "commit",
}  # fmt: skip


@contextmanager
def writable_hub(folders, place, **more):
    """Serve repositories that can be written to. `place` is a folder for what is made. Yields the server."""
    copies = {}
    for repo, folder in folders.items():
        copies[repo] = shutil.copytree(folder, Path(place) / "repositories" / repo, dirs_exist_ok=True)
    with hub(copies, handler=WritableHandler, **more) as server:
        server.place, server.made, server.objects, server.commits, server.requests = Path(place), {}, {}, [], []
        server.commit_of = lambda repo: NEXT if any(made["repo"] == repo for made in server.commits) else COMMIT
        yield server
