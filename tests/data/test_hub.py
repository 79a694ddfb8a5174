"""`hf:` sources against a server on this machine that speaks the hub's protocol."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import story

from calledshot.data import hub
from calledshot.recipe import UsageError

SHA = "0123456789abcdef0123456789abcdef01234567"


def parquet(*texts: str) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), stream)
    return stream.getvalue()


FILES = {
    "README.md": b"# About",
    "data/train-0.parquet": parquet(*(story(n, 80) for n in range(40))),
    "data/train-1.parquet": parquet(*(story(n, 80) for n in range(40, 60))),
    "extra/more.jsonl": b"".join(json.dumps({"text": story(n, 50)}).encode() + b"\n" for n in range(30)),
}


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if path in ("/api/datasets/lab/stories", "/api/datasets/lab/stories/revision/v1"):
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            self.send(json.dumps({"id": "lab/stories", "sha": SHA, "siblings": siblings}).encode(), body)
        elif path.startswith(f"/datasets/lab/stories/resolve/{SHA}/") and path.split(SHA + "/")[1] in FILES:
            content = FILES[path.split(SHA + "/")[1]]
            self.send(content, body, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA})
        else:
            code = "RevisionNotFound" if path.startswith("/api/datasets/lab/stories/") else "RepoNotFound"
            self.send(b"{}", body, {"X-Error-Code": code}, 404)

    def send(self, content: bytes, body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as served:
        served.asked = []
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from data_helpers import recipe_for
from calledshot.data import prepare
from calledshot.recipe import ShotError
from calledshot.recipe.schema import Source
try:
    for path in sys.argv[2:]:
        (source,) = prepare(recipe_for(Source(path=path)), ".").sources
        print(source.name, source.revision, source.train.documents + source.held_out.documents)
except ShotError as error:
    print(error.exit_code, error)
"""


def asked(server, folder: Path, *references: str) -> str:
    # huggingface_hub reads its environment when it is imported.
    environment = {
        **{key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}" if server else "http://127.0.0.1:9",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *references]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_sets_are_listed_downloaded_once_and_pinned_to_a_commit(server, tmp_path):
    references = ["hf:lab/stories", "hf:lab/stories@v1/data/*.parquet", "hf:lab/stories/extra/*"]
    said = asked(server, tmp_path, *references).splitlines()
    assert said == [f"stories {SHA} 90", f"stories@v1 {SHA} 60", f"stories {SHA} 30"]
    downloads = [path for path in server.asked if path.endswith(("parquet", "jsonl"))]
    assert not [path for path in server.asked if path.endswith("README.md")] and downloads
    server.asked.clear()
    assert asked(server, tmp_path, *references).splitlines() == said
    assert not [path for path in server.asked if path.endswith(("parquet", "jsonl"))]


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("hf:lab/none", "2 hf:lab/none: not on the hub, or private"),
        ("hf:lab/stories@v9", "2 hf:lab/stories: no such revision"),
        (
            "hf:lab/stories/*.csv",
            "2 data.sources: hf:lab/stories/*.csv: no file matches; the data set holds README.md, data/",
        ),
    ],
)
def test_what_is_not_there_is_said(server, tmp_path, reference, complaint):
    assert asked(server, tmp_path, reference).startswith(complaint)


def test_a_hub_that_does_not_answer_is_said(tmp_path):
    said = asked(None, tmp_path, "hf:lab/stories")
    assert said.startswith("1 hf:lab/stories: the hub cannot be reached") and "HF_ENDPOINT" in said


def test_references_are_taken_apart():
    assert hub.parse("hf:a/b.c") == hub.Wanted("a/b.c", None, "")
    assert hub.parse("hf:a/b@refs%2Fconvert%2Fparquet/x/*.parquet") == hub.Wanted(
        "a/b", "refs/convert/parquet", "x/*.parquet"
    )
    with pytest.raises(UsageError, match="write hf:OWNER/NAME"):
        hub.parse("hf:alone")
