"""Property: an address is resolved to the same bytes every time, or refused; nothing but safetensors is taken, and all
that is missing is named at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from data.errors import Outage, UserError, UserErrors
from data.files import read_json, sha256_bytes, sha256_file
from tasks.weights import sources
from tasks.weights.sources import (
    CACHE,
    LOCK,
    address_faults,
    availability,
    missing_faults,
    resolve,
    resolve_all,
    scheme_of,
    unfetchable_faults,
)
from tests.servers import free_ports

COMMIT = "a" * 40
REPO = "acme/lora"


def tensor(value: float = 1.0) -> dict[str, np.ndarray]:
    return {"x.lora_A.weight": np.full((2, 3), value, dtype=np.float32)}


@dataclass
class Hub:
    """A Hugging Face hub with one repository, on this machine. `requests` counts the bodies served."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub(
        {
            "adapter_model.safetensors": save(tensor()),
            "adapter_config.json": b'{"r": 2}',
            "README.md": b"words",
            "optimizer.bin": b"\x80\x04.",
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in state.files.items()
            ]
            if state.gated:
                self.reply(403, b"{}", X_Error_Code="GatedRepo")
            elif path.startswith(f"/api/models/{REPO}/tree/"):
                self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif path.startswith(f"/api/models/{REPO}"):
                siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]
                info = {"id": REPO, "sha": state.commit, "siblings": siblings}
                self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"/{REPO}/resolve/{state.commit}/"):
                name = path.removeprefix(f"/{REPO}/resolve/{state.commit}/")
                if self.command == "GET":
                    state.requests.append(name)
                tag = hashlib.sha1(state.files[name]).hexdigest()
                self.reply(200, state.files[name], ETag=f'"{tag}"', X_Repo_Commit=state.commit)
            else:
                self.reply(404, b"{}", X_Error_Code="RepoNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield state
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_pinned_and_verified_ever_after(hub: Hub, tmp_path: Path) -> None:
    found = resolve(f"hf://{REPO}", tmp_path)
    assert sorted(found.files) == ["adapter_config.json", "adapter_model.safetensors"]  # no pickle, no readme
    assert found.revision == COMMIT and found.path == tmp_path / CACHE / found.sha256
    assert sorted(hub.requests) == sorted(found.files)
    assert read_json(tmp_path / LOCK) == {
        f"hf://{REPO}": {"revision": COMMIT, "sha256": found.sha256, "files": found.files}
    }
    assert {name: sha256_bytes(hub.files[name]) for name in found.files} == found.files
    again = resolve(f"hf://{REPO}", tmp_path)
    assert again == found and len(hub.requests) == 2  # from the cache
    with pytest.raises(UserError, match="the params say 0000"):
        resolve(f"hf://{REPO}", tmp_path, "0000")
    assert len(hub.requests) == 2 and found.path.is_dir()  # what the lock names is not fetched again
    save_file(tensor(5.0), found.path / "adapter_model.safetensors")  # the cache is damaged: fetched again
    assert resolve(f"hf://{REPO}", tmp_path) == found and len(hub.requests) == 4
    assert sha256_file(found.path / "adapter_model.safetensors") == found.files["adapter_model.safetensors"]


def test_other_bytes_behind_a_pinned_address_are_refused(hub: Hub, tmp_path: Path) -> None:
    found = resolve(f"hf://{REPO}@main", tmp_path)
    (found.path / "adapter_config.json").write_text("{}")
    hub.files["adapter_model.safetensors"] = save(tensor(2.0))
    with pytest.raises(UserError, match=r"SHA-256 is \w+, weights.lock.json says"):
        resolve(f"hf://{REPO}@main", tmp_path)
    assert not list((tmp_path / CACHE).iterdir())
    with pytest.raises(UserError, match="the params say 0000"):
        resolve(f"hf://{REPO}/adapter_model.safetensors", tmp_path, "0000")
    assert list(read_json(tmp_path / LOCK)) == [f"hf://{REPO}@main"]


def test_one_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    found = resolve(f"hf://{REPO}/adapter_model.safetensors", tmp_path)
    assert (
        found.path.name == "adapter_model.safetensors" and found.files == {} and found.sha256 == sha256_file(found.path)
    )
    assert resolve(f"hf://{REPO}/adapter_model.safetensors", tmp_path) == found and hub.requests == [
        "adapter_model.safetensors"
    ]
    with pytest.raises(UserError, match="of that name, have"):
        resolve(f"hf://{REPO}/other.safetensors", tmp_path)


def test_of_a_pipeline_only_its_parts_in_one_precision(hub: Hub, tmp_path: Path) -> None:
    weights = save(tensor())
    hub.files.clear()
    hub.files |= {
        "model_index.json": json.dumps(
            {"_class_name": "P", "transformer": ["diffusers", "T"], "image_encoder": [None, None]}
        ).encode()
    }
    hub.files |= {
        "transformer/a.safetensors": weights,
        "transformer/a.fp16.safetensors": weights,
        "transformer/config.json": b"{}",
    }
    hub.files |= {
        "single.safetensors": weights,
        "text_encoders/t5.safetensors": weights,
        "image_encoder/x.safetensors": weights,
    }
    assert sorted(resolve(f"hf://{REPO}", tmp_path).files) == [
        "model_index.json",
        "transformer/a.safetensors",
        "transformer/config.json",
    ]


def test_what_the_hub_refuses_says_what_to_do(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such model on the hub, or it is private"):
        resolve("hf://acme/other", tmp_path)
    hub.files = {"pytorch_model.bin": b"\x80\x04."}
    with pytest.raises(UserError, match="pickle files are not taken"):
        resolve(f"hf://{REPO}", tmp_path)
    hub.gated = True
    with pytest.raises(UserError, match="accept the licence"):
        resolve(f"hf://{REPO}", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Outage, match="the hub cannot be reached"):
        resolve(f"hf://{REPO}", tmp_path)
    with pytest.raises(Outage, match=r"teachers\.a: .*cannot be reached"):  # nothing else is wrong: worth another try
        resolve_all({"teachers.a": (f"hf://{REPO}", "")}, tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_local_weights_are_read_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    save_file(tensor(), tmp_path / "lora" / "a.safetensors")
    (tmp_path / "lora" / "notes.md").write_text("words")
    folder, file = resolve("lora", tmp_path), resolve("lora/a.safetensors", tmp_path)
    assert (
        folder.path == tmp_path / "lora"
        and list(folder.files) == ["a.safetensors"]
        and file.sha256 == folder.files["a.safetensors"]
    )
    assert resolve("lora", tmp_path, folder.sha256) == folder and not (tmp_path / LOCK).exists()
    save_file(tensor(2.0), tmp_path / "lora" / "a.safetensors")
    with pytest.raises(UserError, match="the params say"):
        resolve("lora", tmp_path, folder.sha256)


def test_pickle_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    save_file(tensor(), tmp_path / "one" / "a.safetensors")
    (tmp_path / "one" / "b.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "two.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "three").mkdir()
    (tmp_path / "four.safetensors").write_bytes(save(tensor())[:-4])
    (tmp_path / "five.safetensors").write_bytes(b"\x80\x04." + bytes(40))
    wanted = {name: (name, "") for name in ("one", "two.pt", "three", "four.safetensors", "five.safetensors")}
    with pytest.raises(UserErrors) as caught:
        resolve_all(wanted, tmp_path)
    words = (
        "one: .*b.bin: a pickle file",
        "two.pt: .*runs code",
        "three: .*no .safetensors file",
        "four.*not a whole",
        "five.*not a whole",
    )
    assert len(caught.value.faults) == 5
    for fault, expected in zip(caught.value.faults, words, strict=True):
        assert re.search(expected, fault), fault


def test_everything_missing_is_named_at_once_before_any_fetch(hub: Hub, tmp_path: Path) -> None:
    wanted = {
        "teachers.sources.base.uri": f"hf://{REPO}",
        "teachers.sources.local.uri": "weights/local",
        "teachers.sources.global.uri": "weights/global",
    }
    with pytest.raises(
        UserErrors, match=r"(?s)teachers.sources.local.uri = 'weights/local': no such.*teachers.sources.global.uri"
    ):
        resolve_all({label: (uri, "") for label, uri in wanted.items()}, tmp_path)
    assert hub.requests == [] and not (tmp_path / CACHE).exists()
    assert len(missing_faults(wanted, tmp_path)) == 2
    assert list(availability(wanted, tmp_path).values()) == ["to fetch", "missing", "missing"]
    resolve(f"hf://{REPO}", tmp_path)
    assert availability(wanted, tmp_path)["teachers.sources.base.uri"] == "here"


def test_whether_the_hub_would_give_it_is_asked_without_fetching(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = {"a": f"hf://{REPO}", "b": "hf://acme/nothing", "c": "weights/local"}
    (fault,) = unfetchable_faults(uris, tmp_path)
    assert fault.startswith("b is not on this machine: hf://acme/nothing: no such model") and not hub.requests
    hub.gated = True
    assert "accept the licence" in unfetchable_faults({"a": uris["a"]}, tmp_path)[0]
    hub.gated = False
    resolve(uris["a"], tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert unfetchable_faults({"a": uris["a"]}, tmp_path) == []  # it is here by now: nobody is asked
    assert "cannot be reached" in unfetchable_faults({"b": uris["b"]}, tmp_path)[0]


def test_addresses_are_checked_as_they_are_written() -> None:
    good = {
        "a/b": "path",
        "hf://o/n": "hf",
        "hf://o/n@main": "hf",
        "hf://o/n/x/y.safetensors@v1": "hf",
        "s3://b/k/": "s3",
        "models:/m@champion": "models",
    }
    assert {uri: scheme_of(uri) for uri in good} == good and scheme_of("models:/m/3") == "models"
    bad = {name: name for name in ("hf://o", "hf://o/n/x.bin", "s3://b", "models:/m", "https://x/y", "")}
    assert len(address_faults(bad)) == len(bad)


def test_a_new_kind_of_address_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(uri: str, staged: Path, project: Path, revision: str) -> tuple[Path, str]:
        save_file(tensor(float(uri[-1])), staged / "a.safetensors")
        return staged, revision or "first"

    monkeypatch.setitem(sources.SCHEMES, "made", sources.Scheme(re.compile(r"made:\d"), "made:DIGIT", fetch))
    source = resolve("made:7", tmp_path)
    assert (
        source.revision == "first" and source == resolve("made:7", tmp_path) and list(source.files) == ["a.safetensors"]
    )
    assert "expected made:DIGIT" in address_faults({"a": "made:x"})[0]


def test_objects_of_a_bucket(tmp_path: Path, s3: str) -> None:
    """From a real store: one file, a folder, the pins of what came first, and a pickle that is not taken."""
    from tasks.s3.objects import put_new
    from tasks.s3.transfer import upload

    (tmp_path / "a.safetensors").write_bytes(save(tensor()))
    for name in ("x.safetensors", "lora/a.safetensors"):
        upload(tmp_path / "a.safetensors", f"{s3}/{name}")
    assert resolve(f"{s3}/x.safetensors", tmp_path).path.name == "x.safetensors"
    assert list(resolve(f"{s3}/lora", tmp_path).files) == ["a.safetensors"]
    assert len(sources.read_lock(tmp_path)) == 2
    put_new(f"{s3}/pickled/model.bin", b"pickle")
    with pytest.raises(UserError, match="safetensors"):
        resolve(f"{s3}/pickled", tmp_path)
    with pytest.raises(UserError, match="absent"):
        resolve(f"{s3}/absent/x.safetensors", tmp_path)
