"""Names on the hub: the cache first, then a hub that answers; with neither, one line that names the download."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from helpers import ROOT

from gritlm.models.hub import DECODER, model_folder

COMMIT, NAME = "1" * 40, "some/base"
# Each word is the files that are wanted: "config" or "decoder". Prints where they are, or what is wrong.
SCRIPT = """
import json, sys
from gritlm.errors import UserError
from gritlm.models import hub
hub.SECONDS = 0.5
for word in sys.argv[2:]:
    try:
        print(json.dumps(hub.model_folder(sys.argv[1], {"config": hub.CONFIG, "decoder": hub.DECODER}[word])))
    except UserError as error:
        print(json.dumps("error: " + str(error)))
"""


def look_up(cache: Path, endpoint: str, *words: str, name: str = NAME, **env: str) -> list[str]:
    env = {"PYTHONPATH": str(ROOT), "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", **env}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, name, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def serve(folder: Path, stall: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model; its address, and the paths that were asked for. `stall`: it accepts, and never answers."""
    asked: list[str] = []
    closing = Event()

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, body: bool = True) -> None:
            asked.append(self.path)
            if stall:
                closing.wait()
            path, headers = self.path.split("?")[0], {"X-Repo-Commit": COMMIT}
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            code, content = 200, b""
            if path.startswith(f"/api/models/{NAME}/tree/"):
                content = json.dumps([self.entry(file) for file in files]).encode()
            elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
                content = json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode()
            elif (file := folder / path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")).is_file():
                content = file.read_bytes()
                headers["ETag"] = f'"{sha256(content).hexdigest()}"'
            else:
                code, headers = 404, {"X-Error-Code": "RepoNotFound"}
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def entry(self, file: Path) -> dict:
            oid = sha256(file.read_bytes()).hexdigest()
            return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        closing.set()
        server.shutdown()


@pytest.fixture
def remote(qwen3, tmp_path) -> Path:
    """What the hub has: a decoder, and files that no run reads."""
    folder = shutil.copytree(qwen3, tmp_path / "remote")
    (folder / "onnx").mkdir()
    for name in ("README.md", "onnx/model.onnx", "pytorch_model.bin"):
        (folder / name).write_text("not read", encoding="utf-8")
    return folder


def cached(cache: Path, source: Path, *without: str, asked_for_modules: bool = True) -> Path:
    """A cache as transformers leaves it: a snapshot, and notes of the files that the hub does not have."""
    model = cache / "hub" / "models--some--base"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    shutil.copytree(source, model / "snapshots" / COMMIT, ignore=lambda folder, names: without)
    if asked_for_modules:
        (model / ".no_exist" / COMMIT).mkdir(parents=True)
        (model / ".no_exist" / COMMIT / "modules.json").touch()
    return model / "snapshots" / COMMIT


def test_only_what_is_read_is_downloaded_and_only_once(remote, tmp_path):
    with serve(remote) as (endpoint, asked):
        first, second = look_up(tmp_path / "home", endpoint, "config", "config")
        folder = Path(first)
        assert first == second and folder.name == COMMIT
        assert not (folder / "model.safetensors").exists() and (folder / "tokenizer.json").is_file()
        (whole,) = look_up(tmp_path / "home", endpoint, "decoder")
        assert whole == first
        assert (folder / "model.safetensors").read_bytes() == (remote / "model.safetensors").read_bytes()
        assert not [name for name in ("README.md", "onnx", "pytorch_model.bin") if (folder / name).exists()]
        requests = len(asked)
        assert requests > 0, "control: it was asked"
        assert look_up(tmp_path / "home", endpoint, "config", "decoder") == [first, first]
        assert len(asked) == requests, "all is in the cache: nobody is asked"
        (absent,) = look_up(tmp_path / "home", endpoint, "config", name="some/other")
        assert "has no such model, or shows it after a login only" in absent
    assert look_up(tmp_path / "home", endpoint, "config", "decoder") == [first, first], "no hub any more"


@pytest.mark.parametrize("how", ["refused", "stalled", "offline"])
def test_without_a_hub_the_line_names_what_is_missing_and_the_download(qwen3, tmp_path, how):
    with serve(tmp_path, stall=True) as (endpoint, _):
        place = {"refused": "http://127.0.0.1:9", "stalled": endpoint, "offline": endpoint}[how]
        env = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {}
        reason = {"refused": "refused", "stalled": "does not answer within 0.5", "offline": "HF_HUB_OFFLINE is set"}[
            how
        ]
        (nothing,) = look_up(tmp_path / "empty", place, "decoder", **env)
        assert "no config.json of a model of this name in the cache" in nothing and reason in nothing
        assert "`hf download some/base` fetches it" in nothing and "\n" not in nothing
        folder = cached(tmp_path / "partial", qwen3, "model.safetensors")
        there, partial = look_up(tmp_path / "partial", place, "config", "decoder", **env)
        assert there == str(folder), "the config is enough for a plan"
        assert "no model.safetensors of a model of this name" in partial and reason in partial


def test_a_cache_that_may_lack_modules_json_is_used_where_no_hub_can_be_asked(qwen3, tmp_path):
    folder = cached(tmp_path / "cache", qwen3, asked_for_modules=False)
    assert look_up(tmp_path / "cache", "http://127.0.0.1:9", "decoder") == [str(folder)]


def test_a_partial_cache_is_completed(remote, tmp_path):
    folder = cached(tmp_path / "cache", remote, "model.safetensors", "tokenizer.json", "pytorch_model.bin")
    with serve(remote) as (endpoint, _):
        assert look_up(tmp_path / "cache", endpoint, "decoder") == [str(folder)]
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


def test_a_folder_and_what_can_be_no_name_are_left_as_they_are(tmp_path):
    for name in (str(tmp_path), "./absent", "/absent/folder", "a/b/c"):
        assert model_folder(name, DECODER) == name
