"""Models on a hub, against a server on this machine that speaks its protocol: only what is read is fetched."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"1",
    "model-00002-of-00002.safetensors": b"2",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"pickled",
    "original/consolidated.00.pth": b"pickled",
    "flax_model.msgpack": b"other",
}
SCRIPT = """
import sys
from calledshot.data.hub import download_model
from calledshot.recipe import ShotError
try:
    folder, commit = download_model(sys.argv[1])
    print(commit, *sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
except ShotError as error:
    print(error.exit_code, error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path in (f"/api/models/lab/small/revision/{name}" for name in ("main", "v1", SHA)):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            self.send(json.dumps({"id": "lab/small", "sha": SHA, "siblings": siblings}).encode(), body)
        elif path == f"/api/models/lab/small/tree/{SHA}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            self.send(json.dumps(entries).encode(), body)
        elif path.startswith(f"/lab/small/resolve/{SHA}/") and path.split(SHA + "/")[1] in FILES:
            content = FILES[path.split(SHA + "/")[1]]
            self.send(content, body, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA})
        else:
            code = "RevisionNotFound" if path.startswith("/api/models/lab/small/") else "RepoNotFound"
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
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def asked(server, folder: Path, reference: str) -> str:
    # huggingface_hub reads its environment when it is imported.
    environment = {
        **{key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}" if server else "http://127.0.0.1:9",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT, reference], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("reference", ["hf:lab/small", "hf:lab/small@v1"])
def test_a_model_is_fetched_without_what_could_run_code(server, tmp_path, reference):
    commit, *files = asked(server, tmp_path, reference).split()
    assert commit == SHA
    assert files == sorted(name for name in FILES if name.endswith((".json", ".safetensors")))


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("hf:lab/none", "2 hf:lab/none: not on the hub, or private"),
        ("hf:lab/small@v9", "2 hf:lab/small: no such revision"),
        ("hf:lab/small/model.safetensors", "2 hf:lab/small/model.safetensors: a model is a whole repository"),
    ],
)
def test_what_is_not_there_is_said(server, tmp_path, reference, complaint):
    assert asked(server, tmp_path, reference).startswith(complaint)


def test_a_hub_that_does_not_answer_is_said(tmp_path):
    assert asked(None, tmp_path, "hf:lab/small").startswith("1 hf:lab/small: the hub cannot be reached")
