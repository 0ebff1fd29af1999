"""Models on the hub: the real huggingface_hub against a server of this machine, its cache, and without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

import vitok
from vitok import InputError, ViTok

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tokenizer.v1"


@pytest.fixture
def saved(tiny, tmp_path) -> Path:
    tiny().save(tmp_path / "model")
    return tmp_path / "model"


def same(first: ViTok, second: ViTok) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and first.config == second.config


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: the files of a folder under every revision but "gone"."""

    def __init__(self, folder: Path, asked: list[str], *arguments: object) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        match = re.fullmatch(rf"/{re.escape(NAME)}/resolve/([^/]+)/([^/]+)", self.path)
        file = self.folder / match[2] if match and match[1] != "gone" else None
        self.asked.append(f"{self.command} {self.path}")
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if file else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(saved) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, saved, asked))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def fresh(python, tmp_path):
    """`fresh(code, **environment)`: what the code prints where nothing but a cache of its own is known of the hub."""
    pytest.importorskip("huggingface_hub")

    def run(code: str, **environment: str) -> str:
        settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return python(f"import vitok, torch\n{code}", **{**settings, "HF_TOKEN": "", **environment})

    return run


CHECK = """
from safetensors.torch import load_file
state = model.state_dict()
print(all(torch.equal(state[key], value) for key, value in load_file({file!r}).items()), model.training)
"""
REFUSED = """
try:
    vitok.load({name!r})
except vitok.InputError as error:
    print(error)
"""


def test_a_model_is_fetched_once(fresh, hub, saved):
    address, asked = hub
    file = str(saved / "model.safetensors")
    assert fresh(f"model = vitok.load('hf:{NAME}')" + CHECK.format(file=file), HF_ENDPOINT=address) == "True False"
    assert {path.split("/")[-1] for path in asked} == {"config.json", "model.safetensors"}
    assert all(f"/{COMMIT}/" in path for path in asked if path.endswith("safetensors"))  # of the config's revision
    gets = sum(path.startswith("GET") for path in asked)
    code = f"model = vitok.ViTok.from_pretrained({NAME!r}, revision='v2', dtype=torch.float32)"
    assert fresh(code + CHECK.format(file=file), HF_ENDPOINT=address) == "True False"
    assert any("/v2/" in path for path in asked) and sum(path.startswith("GET") for path in asked) == gets


def test_from_the_cache_without_a_network(fresh, saved, tmp_path, one_sentence):
    folder = tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    code = f"model = vitok.load('hf:{NAME}')" + CHECK.format(file=str(snapshot / "model.safetensors"))
    loaded, refused = fresh(code + REFUSED.format(name=f"hf:{NAME}@other"), HF_HUB_OFFLINE="1").splitlines()
    assert loaded == "True False"
    one_sentence(InputError(refused), "config.json", f"https://huggingface.co/{NAME}")


def test_what_cannot_be_fetched(fresh, hub, saved, one_sentence):
    address, _ = hub
    everywhere = ("cannot fetch", "put config.json and model.safetensors from", f"https://huggingface.co/{NAME}")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    refused = "".join(REFUSED.format(name=f"hf:{NAME}{revision}") for revision in ("@gone", ""))
    gone, pickled = fresh(refused, HF_ENDPOINT=address).splitlines()
    one_sentence(InputError(gone), "config.json of", *everywhere)
    one_sentence(InputError(pickled), "model.safetensors of", *everywhere)


@pytest.mark.long
def test_without_a_network(fresh, one_sentence):
    """huggingface_hub tries again for half a minute."""
    refused = fresh(REFUSED.format(name=f"hf:{NAME}"), HF_ENDPOINT="http://127.0.0.1:9")
    one_sentence(InputError(refused), "cannot fetch config.json of", "put config.json and model.safetensors from")


def test_without_the_package(monkeypatch, tiny, tmp_path, one_sentence):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: vitok.load(f"hf:{NAME}"), lambda: tiny().save_pretrained(tmp_path),
        lambda: tiny().push_to_hub(NAME),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, 'pip install "vitok[hub]"')


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer", "a/b/c", "../b", "a/..", "a/b..c", "/a/b", "a/b/", "a\\b/c", "a/b c", "a/b@", "a/b@../../x",
        "a/b@x/../y", "a/b@/x", "", "-a/b", "a/\n", "a/b@x@y", "hf:a/b",
    ],
)  # fmt: skip
def test_names_that_are_none(name, monkeypatch, one_sentence):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(InputError) as error:
        vitok.load(f"hf:{name}")
    one_sentence(error.value, "owner/name")


def test_save_pretrained_writes_a_directory_and_a_card(tiny, tmp_path):
    pytest.importorskip("huggingface_hub")
    tiny().save_pretrained(tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: vitok" in card and "vitok.load" in card
    for again in (ViTok.from_pretrained(tmp_path / "model"), vitok.load(tmp_path / "model")):
        assert same(again, tiny()) and not again.training
    half = ViTok.from_pretrained(str(tmp_path / "model"), map_location="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with pytest.raises(InputError, match="cannot be saved"):
        tiny().for_inference().save_pretrained(tmp_path / "fast")


def test_push_to_hub_sends_the_same_files(tiny, monkeypatch, one_sentence):
    hub = pytest.importorskip("huggingface_hub")
    sent = {}

    def upload(self, *, repo_id, folder_path, **options):
        sent[repo_id] = {file: (Path(folder_path) / file).read_bytes() for file in os.listdir(folder_path)}
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(
        hub.HfApi, "create_repo", lambda self, repo_id, **_: hub.RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    assert tiny().push_to_hub(NAME, private=True).endswith("/commit/1")
    assert sent[NAME].keys() == {"README.md", "config.json", "model.safetensors"}
    assert json.loads(sent[NAME]["config.json"]) == tiny().config.to_dict()
    for name in ("tokenizer", f"{NAME}@main"):
        with pytest.raises(InputError) as error:
            tiny().push_to_hub(name)
        one_sentence(error.value, "owner/name")


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    page = Path(__file__).parents[2] / "docs" / "integrations" / "hub.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, ViTok] = {}
    exec(code, names)
    assert same(names["again"], names["model"])
