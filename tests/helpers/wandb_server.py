"""A W&B server for tests, on loopback and in memory: as much of the protocol as the client speaks for one run."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
LOGIN = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
OWNER = {"id": "1", "name": "tester"}


@dataclass
class StoredRun:
    """What the server was told of one run."""

    starts: list[str] = field(default_factory=list)
    """"new" or "resumed", as each start of the client was answered."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """Every row that was streamed, repeated ones too, in the order in which they came."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)


class WandbServer(ThreadingHTTPServer):
    """Keeps what the client says.

    Attributes:
        url: for WANDB_BASE_URL. The key is `KEY`; every other is refused with 401.
        runs: by id.
        refuse: what is answered with 500: a GraphQL operation ("UpsertBucket") or the end of a path ("file_stream").
        unknown: what the client asked for and is not known here; a test should find it empty.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, StoredRun] = {}
        self.refuse: set[str] = set()
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news; an answer that failed is in `unknown`."""

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """Store what a request brings; an error for one that is not known here."""
        if method == "PUT":
            _, _, run, name = path.split("/", 3)
            self.runs[run].files[name] = body
            return {}
        sent = json.loads(body)
        if path == "/graphql":
            return {"data": self._graphql(sent["operationName"], sent.get("variables") or {})}
        files, _, _, run, kind = path.strip("/").split("/")
        if (files, kind) != ("files", "file_stream"):
            raise LookupError(path)
        rows = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.runs[run].history += [json.loads(row) for row in rows]
        if sent.get("complete"):
            self.runs[run].exit_codes.append(sent["exitcode"])
        return {}

    def _graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "Viewer":
                return {"viewer": {"id": OWNER["id"], "entity": OWNER["name"], "username": OWNER["name"]}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": None}
            case "RunResumeStatus":
                run = self.runs.setdefault(given["name"], StoredRun())
                run.starts.append("resumed" if run.config else "new")
                bucket = _bucket(given, run) if run.config else None
                return {"model": {"id": "1", "name": given["project"], "entity": OWNER, "bucket": bucket}}
            case "UpsertBucket":
                run = self.runs[given["name"]]
                inserted = not run.config
                run.config |= {key: item["value"] for key, item in json.loads(given["config"] or "{}").items()}
                return {"upsertBucket": {"bucket": _bucket(given, run), "inserted": inserted}}
            case "CreateRunFiles":
                put = f"{self.url}/put/{given['run']}/"
                files = [{"name": name, "uploadUrl": put + name} for name in given["files"]]
                return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        raise LookupError(operation)


def _bucket(given: dict[str, Any], run: StoredRun) -> dict[str, Any]:
    return {
        "id": given["name"],
        "name": given["name"],
        "displayName": given["name"],
        "project": {"id": "1", "name": given["project"], "entity": OWNER},
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "summaryMetrics": "{}",
        "historyLineCount": len(run.history),
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsLineCount": 0,
        "eventsTail": "[]",
        "logLineCount": 0,
        "wandbConfig": '{"t": 1}',
    }


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self._status_and_answer(body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _serve  # noqa: N815

    def _status_and_answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        server = self.server
        what = json.loads(body)["operationName"] if self.path == "/graphql" else self.path.rpartition("/")[2]
        if what in server.refuse:
            return 500, {}
        if self.command != "PUT" and self.headers.get("Authorization") != LOGIN:  # uploads go to signed addresses
            return 401, {"errors": [{"message": "wrong key"}]}
        try:
            with server.lock:
                return 200, server.answer(self.command, self.path, body)
        except Exception as error:
            server.unknown.append(f"{self.command} {self.path}: {error!r}")
            return 400, {"errors": [{"message": str(error)}]}

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server while the block runs, on a port that the system chooses."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
