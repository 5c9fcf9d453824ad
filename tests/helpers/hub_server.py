# lines: one server, whose routes read each other's state
"""
A Hub of one process's own, in memory, for tests with the real client: create, push, pull, branch, tag, delete.

    with HubServer() as hub:
        ...  # HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET=1 before the client is imported
        hub.repos["me/model"].commits()
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from helpers.hub_faults import RETRY_AFTER, UNANSWERED, UNTOUCHED

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".parquet")
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REV = r"(?P<rev>[^/]+)"


@dataclass
class Blob:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Commit:
    oid: str
    message: str
    operations: list  # (kind, path) as the client sent them
    files: dict  # path → Blob, the whole tree
    parent: "Commit | None" = None


@dataclass
class Repo:
    private: bool
    gated: bool | str = False  # `"auto"` or `"manual"`
    branches: dict = field(default_factory=dict)  # name → Commit
    tags: dict = field(default_factory=dict)

    def commits(self, branch="main"):
        """Newest first, the initial commit last."""
        found, commit = [], self.branches[branch]
        while commit is not None:
            found.append(commit)
            commit = commit.parent
        return found

    def resolve(self, rev):
        named = {**self.tags, **self.branches}
        named |= {commit.oid: commit for branch in self.branches for commit in self.commits(branch)}
        if rev not in named:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return named[rev]

    def commit(self, branch, message, operations, files):
        parent = self.branches.get(branch)
        seed = f"{message}{parent and parent.oid}{sorted((p, b.etag) for p, b in files.items())}"
        new = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, operations, files, parent)
        self.branches[branch] = new
        return new


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status, code=None, message="", body=None):
        self.status, self.code, self.message, self.body = status, code, message, body or {}


class HubServer:
    """
    Args:
        token (`str`): the token that may write, of the user `me`.

    Attributes:
        repos (`dict[str, Repo]`); lfs (`dict[str, bytes]`): what was uploaded, by sha256.
        fail (`dict[str, int | str]`): step → status with which it fails from now on; `"drop"` closes the connection
            without an answer, `"html"` answers 200 with a page. Steps: `validate`, `create`, `branch`, `info`,
            `preupload`, `batch`, `put`, `verify`, `commit`, `resolve`.
        collections (`dict[str, dict]`): slug → what the client is told of it.
        faults ([`~helpers.hub_faults.Faults`], *optional*): what fails now and then, on top of that.
        readers (`set[str]`): tokens that may read and not write.
        requests (`list[tuple[str, str]]`): method and path of each request.
        bodies (`list[bytes]`): of the same requests, as far as they came.
        ranges (`list[str]`): the `Range` header of each request that has one.
    """

    def __init__(self, token="hf_" + "w" * 34):
        self.token, self.readers = token, set()
        self.repos, self.lfs, self.fail, self.requests, self.bodies, self.ranges = {}, {}, {}, [], [], []
        self.faults, self.collections = None, {}
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def received(self):
        """`{name: bytes}` of all that was ever sent here: bodies, what is base64 in them, and every commit's files."""
        names = [f"{number} {method} {path}" for number, (method, path) in enumerate(self.requests)]
        sent = dict(zip(names, self.bodies, strict=True))
        for name, body in list(sent.items()):
            packed = re.findall(rb'"(?:sample|content)": ?"([^"]*)"', body) if "validate-yaml" not in name else []
            sent |= {f"{name} [{place}]": base64.b64decode(content) for place, content in enumerate(packed)}
        commits = [
            commit for repo in self.repos.values() for branch in repo.branches for commit in repo.commits(branch)
        ]
        sent |= {f"{commit.oid} {path}": blob.content for commit in commits for path, blob in commit.files.items()}
        return sent | {f"{commit.oid} message": commit.message.encode() for commit in commits}

    def name_of(self, repo):
        return next(name for name, other in self.repos.items() if other is repo)


ROUTES = []


def route(method, pattern, step=None, write=False):
    def register(function):
        ROUTES.append((method, re.compile(pattern), step, write, function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _check_access(self, repo_id, write):
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        if token is not None and token != self.hub.token and token not in self.hub.readers:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        if write and token is None:
            raise Refusal(401, message="Invalid username or password.")
        if write and token != self.hub.token:
            raise Refusal(403, message="You don't have the rights to write here")
        if repo_id is not None:
            repo = self.hub.repos.get(repo_id)
            if repo is None or (repo.private and token is None):
                raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
            return repo

    def _handle(self):
        path = urlsplit(self.path).path
        matches = ((each, each[1].fullmatch(path)) for each in ROUTES if self.command in each[0].split())
        route, match = next((pair for pair in matches if pair[1]), (None, None))
        fault = route and self.hub.faults and self.hub.faults.draw(route[2])
        if fault == "half sent":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return
        self.body = self._body()  # read in any case, or the connection cannot be used again
        self.query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.bodies.append(self.body)
            self.hub.ranges += [self.headers["Range"]] * ("Range" in self.headers)
            answer = self._answer(route, match, fault)
        if answer is not None and fault not in UNANSWERED:
            self._send(*answer, fault)
        else:
            self.close_connection = True

    def _answer(self, route, match, fault):
        """Status, headers and content of what is answered, or `None` if nothing is."""
        try:
            if route is None:
                raise Refusal(404, message=f"no route for {self.command} {self.path}")
            _, _, step, write, function = route
            if (how := self.hub.fail.get(step, fault)) in UNTOUCHED or isinstance(how, int):
                return self._failing(how, step)
            found = {name: unquote(value) for name, value in match.groupdict(default="").items()}
            found["repo"] = self._check_access(found.pop("repo", None), write)
            answer = function(self, **{name: value for name, value in found.items() if value is not None})
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            if refusal.status == 429:
                headers["Retry-After"] = str(RETRY_AFTER)
            answer = refusal.status, headers, json.dumps({"error": refusal.message, **refusal.body}).encode()
        if not isinstance(answer, tuple):
            answer = 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        return answer

    def _send(self, status, headers, content, fault):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(content) // 2
        self.wfile.write(content[:half])
        if fault == "half":
            self.close_connection = True
            return
        if fault == "slow":
            self.wfile.flush()
            threading.Event().wait(0.02)  # tests replace `time.sleep`
        self.wfile.write(content[half:])

    def _failing(self, how, step):
        if how == "drop":
            return None
        if how == "html":
            return 200, {"Content-Type": "text/html"}, b"<html><body>Please log in</body></html>"
        raise Refusal(how, message=f"told to fail at {step}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _json(self):
        return json.loads(self.body or b"{}")

    def _name(self):
        given = self._json()
        return f"{given.get('organization') or 'me'}/{given['name']}", given


@route("GET", "/api/whoami-v2")
def _whoami(request, **_):
    if not request.headers.get("Authorization"):
        raise Refusal(401, message="Invalid username or password.")
    return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@route("POST", "/api/validate-yaml", "validate")
def _validate_yaml(request, **_):
    content = request._json()["content"]
    errors = []
    try:
        yaml.safe_load(content.split("---")[1] if content.startswith("---") else "")
    except yaml.YAMLError as error:
        errors.append({"message": str(error)})
    if errors:
        raise Refusal(400, message="invalid", body={"errors": errors, "warnings": []})
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create", "create", write=True)
def _create(request, **_):
    repo_id, given = request._name()
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repos:
        raise Refusal(409, message="You already created this model repo", body={"url": url})
    repo = request.hub.repos[repo_id] = Repo(private=given.get("visibility") == "private")
    repo.commit("main", "initial commit", [], {".gitattributes": Blob(GITATTRIBUTES)})
    return {"url": url, "name": repo_id}


@route("POST", "/api/collections", "collection", write=True)
def _create_collection(request, **_):
    given = request._json()
    slug = f"{given['namespace']}/{re.sub(r'[^a-z0-9]+', '-', given['title'].lower())}-0123456789abcdef"
    if slug in request.hub.collections:
        raise Refusal(409, message="Collection already exists", body={"slug": slug})
    told = {"slug": slug, "title": given["title"], "owner": {"name": given["namespace"]}, "private": given["private"]}
    told |= {"items": [], "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
    request.hub.collections[slug] = told
    return told


@route("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)")
def _collection(request, slug, **_):
    return request.hub.collections[slug]


@route("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "item", write=True)
def _add_item(request, slug, **_):
    given, items = request._json(), request.hub.collections[slug]["items"]
    if any(item["id"] == given["item"]["id"] for item in items):
        raise Refusal(409, message="Item is already in the collection")
    note = {"text": given["note"]} if "note" in given else None
    items.append({"_id": str(len(items)), **given["item"], "position": len(items), "note": note})
    return request.hub.collections[slug]


@route("DELETE", "/api/repos/delete", write=True)
def _delete(request, **_):
    repo_id, _ = request._name()
    if request.hub.repos.pop(repo_id, None) is None:
        raise Refusal(404, "RepoNotFound", "Repository not found")
    return {}


@route("PUT", f"/api/(?:models|datasets)/{REPO}/settings", "settings", write=True)
def _settings(request, repo):
    given = request._json()
    if "visibility" in given:
        repo.private = given["visibility"] == "private"
    repo.gated = given.get("gated", repo.gated)
    return {"private": repo.private, "gated": repo.gated}


@route("GET", f"/api/(?:models|datasets)/{REPO}/auth-check/write", "access", write=True)
def _auth_check(request, **_):
    return {}


@route("POST", f"/api/(?:models|datasets)/{REPO}/preupload/{REV}", "preupload", write=True)
def _preupload(request, repo, rev):
    present, answer = repo.resolve(rev).files, []
    for given in request._json()["files"]:
        path = given["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or given["size"] > 10_000_000 else "regular"
        oid = present[path].etag if path in present else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answer}


@route("POST", rf"(?:/datasets)?/{REPO}\.git/info/lfs/objects/batch", "batch", write=True)
def _lfs_batch(request, repo):
    objects = []
    for given in request._json()["objects"]:
        entry = {"oid": given["oid"], "size": given["size"]}
        if given["oid"] not in request.hub.lfs:
            href = f"{request.hub.url}/lfs/{given['oid']}"
            entry["actions"] = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
        objects.append(entry)
    return 200, {"Content-Type": "application/vnd.git-lfs+json"}, json.dumps({"objects": objects}).encode()


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "put")
def _lfs_put(request, oid, **_):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, message="the content is not what its sha256 says")
    request.hub.lfs[oid] = request.body
    return {}


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify")
def _lfs_verify(request, oid, **_):
    if len(request.hub.lfs.get(oid, b"")) != request._json()["size"]:
        raise Refusal(422, message="size differs")
    return {}


@route("POST", f"/api/(?:models|datasets)/{REPO}/commit/{REV}", "commit", write=True)
def _commit(request, repo, rev):
    if rev not in repo.branches:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
    head = repo.branches[rev]
    files, operations, header = dict(head.files), [], {}
    for line in request.body.splitlines():
        item = json.loads(line)
        kind, value = item["key"], item["value"]
        if kind == "header":
            header = value
            continue
        operations.append((kind, value["path"]))
        if kind == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in request.hub.lfs:
                raise Refusal(400, message=f"LFS pointer of {value['path']} has no content")
            files[value["path"]] = Blob(request.hub.lfs[value["oid"]], lfs=True)
        elif kind == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        elif kind == "deletedFolder":
            files = {path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        else:
            raise Refusal(400, message=f"unknown operation {kind}")
    if header.get("parentCommit", head.oid) != head.oid:
        raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
    new = repo.commit(rev, header["summary"], operations, files)
    return {"commitOid": new.oid, "commitUrl": f"{request.hub.url}/{request.hub.name_of(repo)}/commit/{new.oid}"}


def _entry(path, blob):
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


@route("GET", f"/api/(?:models|datasets)/{REPO}/tree/{REV}(/(?P<path>.*))?")
def _tree(request, repo, rev, path):
    files, prefix = repo.resolve(rev).files, f"{path.strip('/')}/" if path else ""
    inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
    if not inside and prefix:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries, folders = [], set()
    for name, blob in sorted(inside.items()):
        parts = name.removeprefix(prefix).split("/")
        folders |= {prefix + "/".join(parts[:i]) for i in range(1, len(parts) if recursive else min(2, len(parts)))}
        if recursive or len(parts) == 1:
            entries.append(_entry(name, blob))
    oids = {folder: hashlib.sha1(folder.encode()).hexdigest() for folder in sorted(folders)}
    return [{"type": "directory", "path": name, "size": 0, "oid": oid} for name, oid in oids.items()] + entries


@route("POST", f"/api/(?:models|datasets)/{REPO}/paths-info/{REV}")
def _paths_info(request, repo, rev):
    files = repo.resolve(rev).files
    return [_entry(path, files[path]) for path in parse_qs(request.body.decode()).get("paths", []) if path in files]


@route("GET", f"/api/(?:models|datasets)/{REPO}(/revision/{REV})?", "info")
def _info(request, repo, rev):
    commit = repo.resolve(rev or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        siblings = [{"rfilename": path, **_entry(path, blob)} for path, blob in sorted(commit.files.items())]
        for entry in siblings:  # named differently here than in a tree
            entry["blobId"] = entry["oid"]
            if "lfs" in entry:
                entry["lfs"]["sha256"] = entry["lfs"]["oid"]
    name = request.hub.name_of(repo)
    answer = {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}
    return {**answer, "gated": repo.gated, "downloads": 0, "likes": 0}


@route("GET", f"/api/(?:models|datasets)/{REPO}/refs")
def _refs(request, repo):
    def listed(refs, kind):
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c.oid} for n, c in refs.items()]

    return {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}


@route("GET", f"/api/(?:models|datasets)/{REPO}/commits/{REV}")
def _commits(request, repo, rev):
    commit, answer = repo.resolve(rev), []
    while commit is not None:
        answer.append({"id": commit.oid, "title": commit.message, "message": "", "date": "2024-01-01T00:00:00.000Z"})
        answer[-1]["authors"] = [{"user": "me"}]
        commit = commit.parent
    return answer


@route("POST DELETE", f"/api/(?:models|datasets)/{REPO}/branch/{REV}", "branch", write=True)
def _branch(request, repo, rev):
    if request.command == "DELETE":
        if repo.branches.pop(rev, None) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
    elif rev in repo.branches:
        raise Refusal(409, message="Reference already exists")
    else:
        repo.branches[rev] = repo.resolve(request._json().get("startingPoint") or "main")
    return {}


@route("POST DELETE", f"/api/(?:models|datasets)/{REPO}/tag/{REV}", "tag", write=True)
def _tag(request, repo, rev):
    if request.command == "DELETE":
        if repo.tags.pop(rev, None) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return {}
    tag = request._json()["tag"]
    if tag in repo.tags:
        raise Refusal(409, message="Tag reference exists already")
    repo.tags[tag] = repo.resolve(rev)
    return {}


@route("GET HEAD", f"(?:/datasets)?/{REPO}/resolve/{REV}/(?P<path>.+)", "resolve")
def _resolve(request, repo, rev, path):
    token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
    if repo.gated and token != request.hub.token:
        raise Refusal(403 if token else 401, "GatedRepo", "Access to this model is restricted: ask for it on its page")
    commit = repo.resolve(rev)
    if path not in commit.files:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    blob = commit.files[path]
    content, status = blob.content, 200
    headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(content))}
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        content, status = content[start : end + 1], 206
    return status, headers, content
