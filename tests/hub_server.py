"""A Hub in memory on 127.0.0.1, for tests of pushing and loading: the part of the Hub's HTTP protocol that they use.

It speaks repository creation, preupload, the LFS batch API with basic transfer, commits as NDJSON, listings and file
downloads. Hashes are those of Git and Git LFS. A test can let it fail at one step, by a broken connection or a status
code. It knows no authentication, no branches of pull requests and no Xet.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_PATTERN = re.compile(r"\.(safetensors|bin|png)$")  # what the Hub's default .gitattributes sends to LFS


@dataclass
class Commit:
    """One state of a repository: path -> content."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    pull_requests: list[Commit] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch name or a hash means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class HubServer:
    """Start it as a context manager; `url` is what HF_ENDPOINT should be.

    Args:
        repos: repository id -> its state.
        blobs: sha256 -> content of every large file that was received, published or not.
        requests: "METHOD path" of every request, in order.
        failures: step ("create", "preupload", "batch", "upload", "commit") -> a status code to answer with, or "drop"
            to close the connection in the middle. A step fails until its entry is deleted.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: dict[str, int | str] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def redirect(self, monkeypatch) -> None:
        """Let huggingface_hub and transformers talk to this server until `monkeypatch` undoes it."""
        settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": self.url}
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        # transformers keeps one client, which remembers where the Hub was when it was first asked for
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """What was published on a branch, without the empty commit that creates the repository."""
        return self.repos[repo_id].branches[branch][1:]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id].branches[branch][-1].files

    # ---- what the routes do ----------------------------------------------------------------------------------------

    def create_repo(self, body: dict) -> tuple[int, dict]:
        repo_id = f"{body.get('organization') or 'someone'}/{body['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return 409, answer | {"error": "You already created this model repo"}
        self.repos[repo_id] = Repo(private=body.get("visibility") == "private" or bool(body.get("private")))
        first = Commit(git_oid(repo_id.encode()), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.repos[repo_id].branches["main"] = [first]
        return 200, answer

    def preupload(self, repo: Repo, revision: str, body: dict) -> dict:
        commit = repo.find(revision)
        files = []
        for file in body["files"]:
            is_lfs = bool(LFS_PATTERN.search(file["path"]))
            old = commit.files.get(file["path"]) if commit else None
            oid = None if old is None else sha256(old) if is_lfs else git_oid(old)
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, body: dict) -> dict:
        objects = []
        for wanted in body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/lfs/verify"},
                }
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo_id: str, revision: str, lines: list[dict], as_pull_request: bool) -> tuple[int, dict]:
        """Apply all operations to a copy of the last state; only a copy that is complete becomes a commit."""
        repo = self.repos[repo_id]
        history = repo.branches[revision]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, history[-1].oid):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        files = dict(history[-1].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return 400, {"error": f"LFS object {value['oid']} of {value['path']} was not uploaded"}
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"unknown operation {line['key']}"}
        oid = git_oid(json.dumps([len(history), sorted((p, sha256(c)) for p, c in files.items())]).encode())
        commit = Commit(oid, header["summary"], files)
        if as_pull_request:
            repo.pull_requests.append(commit)
        else:
            history.append(commit)
        url = f"{self.url}/{repo_id}"
        answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid}
        return 200, answer | {"pullRequestUrl": f"{url}/discussions/{len(repo.pull_requests)}"}


class _Handler(BaseHTTPRequestHandler):
    """Routes requests to the hub; every route gets the match of its pattern and answers itself."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("POST", r"/api/repos/create", "do_create"),
        ("POST", r"/api/validate-yaml", "do_validate_yaml"),
        ("GET", r"/api/whoami-v2", "do_whoami"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "do_preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "do_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "do_upload"),
        ("POST", r"/lfs/verify", "do_verify"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "do_commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "do_branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "do_tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "do_info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "do_resolve"),
    )

    def do_GET(self):
        self._route("GET")

    def do_HEAD(self):
        self._route("GET")

    def do_POST(self):
        self._route("POST")

    def do_PUT(self):
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.hub.requests.append(f"{self.command} {path}")
        for route_method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                self.parts = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
                getattr(self, name)()
                return
        self._body()
        self._answer(404, {"error": f"no route for {self.command} {path}"})

    # ---- routes ----------------------------------------------------------------------------------------------------

    def do_create(self):
        body = self._json()
        if not self._fails("create"):
            with self.hub.lock:
                self._answer(*self.hub.create_repo(body))

    def do_validate_yaml(self):
        self._body()
        self._answer(200, {"errors": [], "warnings": []})

    def do_whoami(self):
        self._answer(200, {"name": "someone", "type": "user", "orgs": []})

    def do_preupload(self):
        body, repo = self._json(), self._repo()
        if repo and not self._fails("preupload"):
            self._answer(200, self.hub.preupload(repo, self.parts["revision"], body))

    def do_batch(self):
        body = self._json()
        if self._repo() and not self._fails("batch"):
            self._answer(200, self.hub.batch(body))

    def do_upload(self):
        if self.hub.failures.get("upload") == "drop":
            self.rfile.read(1000)  # some of the file has come, and is forgotten
        if self._fails("upload"):
            return
        content = self._body()
        if sha256(content) != self.parts["oid"]:
            self._answer(400, {"error": "the content does not have this hash"})
            return
        with self.hub.lock:
            self.hub.blobs[self.parts["oid"]] = content
        self._answer(200, {})

    def do_verify(self):
        body = self._json()
        content = self.hub.blobs.get(body["oid"])
        self._answer(200 if content is not None and len(content) == body["size"] else 404, {})

    def do_commit(self):
        body, repo = self._body(), self._repo()
        if repo and not self._fails("commit"):
            lines = [json.loads(line) for line in body.splitlines() if line]
            with self.hub.lock:
                self._answer(
                    *self.hub.commit(self.parts["repo"], self.parts["revision"], lines, "create_pr" in self.query)
                )

    def do_branch(self):
        self._body()
        repo, name = self._repo(), self.parts["revision"]
        if repo is None:
            return
        if name in repo.branches:
            self._answer(409, {"error": "the branch exists"})
            return
        repo.branches[name] = repo.branches["main"][:1]
        self._answer(200, {})

    def do_info(self):
        repo = self._repo()
        commit = self._commit(repo) if repo else None
        if commit:
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            info = {"id": self.parts["repo"], "modelId": self.parts["repo"], "sha": commit.oid, "siblings": siblings}
            self._answer(200, info | {"private": repo.private, "tags": [], "downloads": 0, "likes": 0})

    def do_tree(self):
        repo = self._repo()
        commit = self._commit(repo) if repo else None
        if commit is None:
            return
        folder = f"{self.parts['path']}/" if self.parts["path"] else ""
        entries = []
        for path, content in sorted(commit.files.items()):
            if not path.startswith(folder) or (
                "true" not in self.query.get("recursive", []) and "/" in path[len(folder) :]
            ):
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if LFS_PATTERN.search(path):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        if folder and not entries:
            self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, entries)

    def do_resolve(self):
        repo = self._repo()
        commit = self._commit(repo) if repo else None
        if commit is None:
            return
        content = commit.files.get(self.parts["path"])
        headers = {"X-Repo-Commit": commit.oid}
        if content is None:
            self._answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        etag = sha256(content) if LFS_PATTERN.search(self.parts["path"]) else git_oid(content)
        self._send(200, content, headers | {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream"})

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _repo(self) -> Repo | None:
        repo = self.hub.repos.get(self.parts["repo"])
        if repo is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    def _commit(self, repo: Repo) -> Commit | None:
        commit = repo.find(self.parts.get("revision") or "main")
        if commit is None:
            self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _fails(self, step: str) -> bool:
        """Fail as the test asked for, and say whether that was so."""
        how = self.hub.failures.get(step)
        if how is None:
            return False
        self.close_connection = True
        if how == "drop":
            self.connection.close()
        else:
            self._answer(how, {"error": f"the test asked for {how} at {step}"}, {"Connection": "close"})
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self) -> dict:
        return json.loads(self._body() or b"{}")

    def _answer(self, status: int, content: dict | list, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Tests read `requests` instead."""


@contextmanager
def local_hub(monkeypatch, cache: Path) -> Iterator[HubServer]:
    """A Hub of this machine that huggingface_hub talks to instead of the real one; waiting between retries is cut."""
    sleep = time.sleep
    with HubServer() as server:
        server.redirect(monkeypatch)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield server
