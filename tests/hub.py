"""A stand-in for the Hugging Face Hub on localhost: enough of its API to load by name and to upload a folder.

    with Hub() as hub:
        hub.add("usuario/modelo", folder)                     # {path: bytes} or a folder
        subprocess.run([...], env=hub.environment(tmp_path))  # HF_ENDPOINT is read at import, so: a process of its own
        hub.repos["usuario/nuevo"]                            # what was uploaded, {path: bytes}

Everything lives in memory. `hub.private[name]` is what create_repo asked for, `hub.requests` lists (method, path,
authorization) of every request. `hub.status[name] = 503` makes a repository answer so, `hub.gated` are names whose
files need permission, `hub.closed` those that take nothing more; private ones need `hub.token`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 10_000  # bytes from which an upload goes through LFS
MOST_REQUESTS = 2000  # a client that loops is cut off


class Hub:
    def __init__(self, token="hf_prueba", user="usuario"):
        self.token, self.user = token, user
        self.repos, self.private, self.status, self.gated, self.closed = {}, {}, {}, set(), set()
        self.blobs, self.requests, self.commits, self.squashed = {}, [], {}, 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, files, private=False):
        """Publish `files`, a folder or {path: bytes}, as the repository `name`."""
        if not isinstance(files, dict):
            root = Path(files)
            files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.repos[name], self.private[name], self.commits[name] = dict(files), private, 0

    def sha(self, name):
        return hashlib.sha1(f"{name} {self.commits[name]}".encode()).hexdigest()

    def environment(self, home, token=None, **more):
        """Variables of a process that takes this server for the Hub, with an empty cache in the folder `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        return kept | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {}), **more,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, code, message="no"):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        hub.requests.append((self.command, path, authorization))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if len(hub.requests) > MOST_REQUESTS:
            return self.error(429, "TooManyRequests")
        allowed = authorization == f"Bearer {hub.token}"
        if path.startswith("/lfs/"):  # a signed address, as on the real Hub: no authorization
            hub.blobs[path.removeprefix("/lfs/")] = self.body
            return self.answer()
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": hub.user, "orgs": []}) if allowed else self.error(401, "")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create_repo(allowed)
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.commit),
            (r"/api/models/([^/]+/[^/]+)/super-squash/[^/]+", self.squash),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/paths-info/[^/]+", self.paths_info),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.info),
            (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match is None:
                continue
            name = match[1]
            if name in hub.status:
                return self.error(hub.status[name], "")
            if name not in hub.repos or (hub.private[name] and not allowed):
                return self.error(404 if allowed else 401, "RepoNotFound", "Repository not found")
            if method in (self.preupload, self.lfs_batch, self.commit, self.squash) and not allowed:
                return self.error(403, "", "write access needed")
            if name in hub.closed and method in (self.preupload, self.lfs_batch, self.commit):
                return self.error(403, "", "no storage left")
            if name in hub.gated and method == self.resolve:
                return self.error(403, "GatedRepo", "Access to this model is restricted")
            return method(*match.groups())
        return self.error(404, "")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create_repo(self, allowed):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if not allowed or not name.startswith(f"{self.hub.user}/"):
            return self.error(403 if allowed else 401, "", "You don't have the rights to create a model here")
        if name in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.add(name, {}, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def entry(self, name, path):
        data = self.hub.repos[name][path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def info(self, name):
        siblings = [{"rfilename": path} for path in sorted(self.hub.repos[name])]
        private = self.hub.private[name]
        self.answer({"id": name, "modelId": name, "sha": self.hub.sha(name), "private": private, "siblings": siblings})

    def tree(self, name, under):
        paths = [path for path in sorted(self.hub.repos[name]) if path.startswith(under)]
        if under and not paths:
            return self.error(404, "EntryNotFound")
        self.answer([self.entry(name, path) for path in paths])

    def paths_info(self, name):
        wanted = json.loads(self.body)["paths"] if self.body.startswith(b"{") else []
        self.answer([self.entry(name, path) for path in wanted if path in self.hub.repos[name]])

    def resolve(self, name, path):
        data = self.hub.repos[name].get(path)
        if data is None:
            return self.error(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(data, ETag=etag, X_Repo_Commit=self.hub.sha(name), Content_Type="application/octet-stream")

    def preupload(self, name):
        files = json.loads(self.body)["files"]
        modes = [("lfs" if file["size"] >= LARGE else "regular", file["path"]) for file in files]
        self.answer({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for mode, path in modes]})

    def lfs_batch(self, name):
        objects = json.loads(self.body)["objects"]
        for blob in objects:
            blob["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{blob['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def squash(self, name):
        self.hub.squashed += 1
        self.answer({})

    def commit(self, name):
        files = self.hub.repos[name]
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                data = self.hub.blobs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                    del files[path]
        self.hub.commits[name] += 1
        sha = self.hub.sha(name)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})
