"""What a run's files and card say of it, and sending them to the Hub."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import tunekit
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.progress import Silent
from tunekit.push import push
from tunekit.run import Run

FILES = {
    "README.md",
    "pictures/1.png",
    "pictures/2.png",
    "zorp-diffusers.safetensors",
    "zorp-kohya.safetensors",
}


@pytest.fixture(scope="module")
def run(
    tiny_folder: Callable[..., Path],
    pictures: Path,
    judges: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A short run, with everything said that a recipe can say of its files."""
    recipe = {
        "name": "zorp",
        "base": {"model": str(tiny_folder())},
        "data": {"source": str(pictures / "train"), "trigger": "zorp", "class": "robot"},
        "adapter": {"kind": "lora", "rank": 2},
        "train": {"steps": 1, "batch_size": 2, "sample_every": 0},
        "evaluate": {
            "steps": 1,
            "seeds": [1],
            "prompts": ["a {trigger} {class}", 'a {trigger} "{class}": at night'],
            **judges,
        },
        "export": {"license": "openrail++", "thumbnail": True},
    }
    return tunekit.train(recipe, out=tmp_path_factory.mktemp("r") / "run", reporter=Silent())


def copied(run: Run, tmp_path: Path) -> Path:
    return shutil.copytree(run.folder, tmp_path / "copy")


class TestWhatTheySay:
    def test_the_hub_reads_the_card(self, run: Run) -> None:
        card = ModelCard.load(run.folder / "export" / "README.md")
        data = card.data.to_dict()
        assert data["license"] == "openrail++"
        assert data["library_name"] == "diffusers"
        assert data["pipeline_tag"] == "text-to-image"
        assert "zorp" in data["instance_prompt"]
        assert {"text-to-image", "diffusers", "lora", "template:sd-lora"} <= {*data["tags"]}
        assert [shown["text"] for shown in data["widget"]] == [
            "a zorp robot",
            'a zorp "robot": at night',
        ]
        for shown in data["widget"]:
            with Image.open(run.folder / "export" / shown["output"]["url"]) as picture:
                assert picture.size == (32, 32)
        assert "| subject likeness |" in card.text

    def test_every_file_is_known_by_its_tensors(self, run: Run) -> None:
        for file in run.files:
            whole = file.path.read_bytes()
            head = 8 + int.from_bytes(whole[:8], "little")
            digest = hashlib.sha256(whole[head:]).hexdigest()
            _, said = read_safetensors(file.path)
            assert said["sshs_model_hash"] == digest
            assert said["modelspec.hash_sha256"] == f"0x{digest}"

    def test_metadata_tells_tags_pictures_and_a_thumbnail(self, run: Run, pictures: Path) -> None:
        _, said = read_safetensors(run.files[0].path)
        assert said["modelspec.license"] == "openrail++"
        tags = json.loads(said["ss_tag_frequency"])["zorp"]
        lines = (pictures / "train" / "metadata.jsonl").read_text().splitlines()
        assert tags == {json.loads(line)["text"]: 1 for line in lines}
        assert said["ss_num_train_images"] == str(len(lines))
        assert json.loads(said["ss_dataset_dirs"]) == {"zorp": {"img_count": len(lines)}}
        manifest = json.loads((run.folder / "pictures.json").read_text())
        told = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()
        assert said["tunekit.data"] == hashlib.sha256(told).hexdigest()
        kind, _, data = said["modelspec.thumbnail"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
            assert thumbnail.size == (32, 32)


class TestDryRun:
    def test_it_says_what_would_be_sent(self, run: Run) -> None:
        planned = push(run.folder, "me/zorp", dry_run=True)
        assert {*planned.files} == FILES
        for name, size in planned.files.items():
            assert (run.folder / "export" / name).stat().st_size == size
        told = "\n".join(planned.lines())
        assert "would be sent to me/zorp, a public repository" in told
        assert "nothing was sent (--dry-run)" in told
        assert "the card names no base" in told
        assert "licence" not in told

    def test_what_lies_beside_stays_here(self, run: Run, tmp_path: Path) -> None:
        folder = copied(run, tmp_path)
        (folder / "export" / "notes.txt").write_text("mine")
        (folder / "export" / "zorp-kohya.safetensors.rejected").write_bytes(b"no")
        assert {*push(folder, "me/zorp", dry_run=True).files} == FILES


class TestRefusals:
    def test_a_run_that_has_not_finished(self, run: Run, tmp_path: Path) -> None:
        folder = copied(run, tmp_path)
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"outcome": "interrupted"}))
        with pytest.raises(UserError, match="is interrupted, at step 1: only what a finished"):
            push(folder, "me/zorp", dry_run=True)

    def test_files_that_are_not_what_the_run_wrote(self, run: Run, tmp_path: Path) -> None:
        folder = copied(run, tmp_path)
        path = folder / "export" / "zorp-kohya.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(UserError, match="its content has changed since it was written"):
            push(folder, "me/zorp", dry_run=True)

    @pytest.mark.parametrize("repo", ["zorp", "me/zo rp", "../zorp", ""])
    def test_a_name_that_is_none(self, repo: str, run: Run) -> None:
        with pytest.raises(UserError, match="is no repository's name: write OWNER/NAME"):
            push(run.folder, repo, dry_run=True)

    def test_a_card_that_shows_files_from_elsewhere(self, run: Run, tmp_path: Path) -> None:
        folder = copied(run, tmp_path)
        card = folder / "export" / "README.md"
        card.write_text(card.read_text().replace("pictures/1.png", "../recipe.yaml"))
        with pytest.raises(UserError, match=r"shows .*recipe\.yaml, which is no file beside it"):
            push(folder, "me/zorp", dry_run=True)

    def test_no_token(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match="no access token: log in with `hf auth login`"):
            push(run.folder, "me/zorp")


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload needs, on this machine. refused: the status it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[tuple[str, str | None, bytes]] = []
        self.refused: int | None = None
        self.place = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        if self.server.refused is not None:
            return self.answer({"error": "no"}, self.server.refused)
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.place}/me/zorp"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": name, **plain} for name in names]})
        if "/commit/" in self.path:
            done = f"{self.server.place}/me/zorp/commit/1"
            return self.answer({"commitUrl": done, "commitOid": "1"})
        return self.answer({})

    def answer(self, value: Any, status: int = 200) -> None:
        told = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def command(run: Run, server: Hub, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    told = {
        "HF_ENDPOINT": server.place,
        "HF_TOKEN": "hf_only_for_this_test",
        "HF_HOME": str(tmp_path),
    }
    return subprocess.run(
        [sys.executable, "-m", "tunekit", "push", str(run.folder), "--repo", "me/zorp"],
        env={key: v for key, v in os.environ.items() if key != "HF_HUB_OFFLINE"} | told,
        capture_output=True,
        text=True,
        check=False,
    )


class TestSending:
    """To a server of this machine, by the command as it is typed."""

    def test_the_files_arrive_and_nothing_else(self, run: Run, server: Hub, tmp_path: Path) -> None:
        done = command(run, server, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "sent to http" in done.stdout
        assert {who for _, who, _ in server.asked if who} == {"Bearer hf_only_for_this_test"}
        (sent,) = (body for path, _, body in server.asked if "/commit/" in path)
        lines = [json.loads(line) for line in sent.splitlines()]
        files = {e["value"]["path"]: e["value"]["content"] for e in lines if e["key"] == "file"}
        assert {*files} == FILES
        for name, content in files.items():
            assert base64.b64decode(content) == (run.folder / "export" / name).read_bytes()
        assert "hf_only_for_this_test" not in done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("status", "said"),
        [(401, "log in again with `hf auth login`"), (403, "may not write there")],
    )
    def test_a_refusal_is_one_line(
        self, status: int, said: str, run: Run, server: Hub, tmp_path: Path
    ) -> None:
        server.refused = status
        done = command(run, server, tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
