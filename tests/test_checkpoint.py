"""Checkpoints and tensor files: whole or not at all, and nothing hostile is read."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile import Canary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunekit import checkpoint
from tunekit.errors import UserError


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "adapter": {"a": torch.full((3, 4), value), "b": torch.arange(5.0)},
        "optimizer": {"step": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "step-000010", tensors(), {"step": 10, "name": "zörp"})


def test_what_is_saved_is_read(folder: Path) -> None:
    found = checkpoint.read(folder)
    assert found.meta == {"step": 10, "name": "zörp"}
    for name, group in tensors().items():
        assert found.tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            assert found.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(found.tensors[name][key], tensor)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-000010"]


def test_tensors_read_live_on_when_the_file_changes(folder: Path) -> None:
    found = checkpoint.read(folder).tensors["adapter"]["a"]
    (folder / "adapter.safetensors").write_bytes(b"\0" * 200)
    assert torch.equal(found, tensors()["adapter"]["a"])


def test_saving_again_replaces_the_whole_folder(folder: Path) -> None:
    checkpoint.save(folder, {"adapter": {"a": torch.zeros(1)}}, {"step": 11})
    found = checkpoint.read(folder)
    assert found.meta == {"step": 11}
    assert list(found.tensors) == ["adapter"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-000010"]


def test_steps_are_listed_in_order_and_half_written_ones_are_not(folder: Path) -> None:
    parent = folder.parent
    for step in (2, 1_000_000):
        checkpoint.save(parent / f"step-{step:06}", tensors(), {})
    (parent / ".step-000020.partial").mkdir()
    (parent / "step-000030").mkdir()
    (parent / "step-000030" / "adapter.safetensors").write_bytes(b"half")
    (parent / "step-last").mkdir()
    names = [path.name for path in checkpoint.steps(parent)]
    assert names == ["step-000002", "step-000010", "step-1000000"]
    assert checkpoint.steps(parent / "none") == []


# Saves a checkpoint of 64 MB and is killed in the middle of it, after a good one.
_KILLED = """
import os, sys, threading, time, torch
from pathlib import Path
from tunekit import checkpoint
parent = Path(sys.argv[1])
checkpoint.save(parent / "step-000001", {"adapter": {"a": torch.ones(4)}}, {})
def kill():
    while not list(parent.glob(".step-000002.partial/*")):
        time.sleep(0.0002)
    os.kill(os.getpid(), 9)
threading.Thread(target=kill, daemon=True).start()
large = {name: {"a": torch.ones(4_000_000)} for name in ("w", "x", "y", "z")}
checkpoint.save(parent / "step-000002", large, {})
"""


def test_a_folder_half_written_at_a_kill_is_never_taken(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".step-000002.partial").is_dir(), "it was killed too late to prove anything"
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-000001"]
    checkpoint.read(tmp_path / "step-000001")
    checkpoint.save(tmp_path / "step-000002", tensors(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "meta.json"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_byte_is_found_and_the_file_named(folder: Path, name: str, place: float) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="has changed") as caught:
        checkpoint.read(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter.safetensors", "meta.json"])
def test_a_truncated_or_missing_file_is_found_and_named(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}: has \d+ bytes instead of \d+"):
        checkpoint.read(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        checkpoint.read(folder)


@pytest.mark.parametrize(
    ("manifest", "fault"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"format": 1}', "lists no files"),
        ('{"format": 2, "files": {"meta.json": {}}}', "format 2"),
        ('{"format": 1, "files": {"meta.json": 3}}', "is no file of this"),
        ('{"format": 1, "files": {"meta.json": {}, "../x": {}}}', "is no file of this"),
        ('{"format": 1, "files": {"/etc/passwd": {}, "meta.json": {}}}', "is no file of this"),
    ],
)
def test_a_broken_or_hostile_manifest_is_refused(folder: Path, manifest: str, fault: str) -> None:
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=fault):
        checkpoint.read(folder)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no checkpoint: it has no manifest\.json"):
        checkpoint.read(tmp_path)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((folder / "meta.json").read_bytes())
    (folder / "meta.json").unlink()
    (folder / "meta.json").symlink_to(outside)
    with pytest.raises(UserError, match="is no file of this checkpoint"):
        checkpoint.read(folder)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_renamed_safetensors_is_refused_unread(tmp_path: Path, protocol: int) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Canary(canary), protocol))
    with pytest.raises(UserError, match="is a pickle") as caught:
        checkpoint.read_safetensors(path)
    assert str(path) in str(caught.value)
    assert not canary.exists()


def test_a_torch_zip_renamed_safetensors_is_refused_unread(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.safetensors"
    torch.save({"a": Canary(canary)}, path)
    with pytest.raises(UserError, match="is a pickle"):
        checkpoint.read_safetensors(path)
    assert not canary.exists()


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is no safetensors file"),
        (b"\x08", "is no safetensors file"),
        (b"<html><body>404 not found</body></html>", "is no safetensors file"),
        (safetensors(b"{}", length=2**63), "header claims 9223372036854775808 bytes"),
        (safetensors(ONE, b"\0" * 4, length=10**9), "header claims 1000000000 bytes"),
        (safetensors(ONE, b"\0" * 3), "is damaged"),
        (safetensors(ONE, b"\0" * 5), "is damaged"),
        (safetensors(ONE[:-1], b"\0" * 4), "is damaged"),
        (safetensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'), "is damaged"),
        (safetensors(ONE.replace(b"[1]", b"[999999999999]"), b"\0" * 4), "is damaged"),
        (safetensors(ONE.replace(b"[0,4]", b"[0,400]"), b"\0" * 4), "is damaged"),
        (safetensors(ONE.replace(b"F32", b"X99"), b"\0" * 4), "is damaged"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        checkpoint.read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_bytes_bring_anything_but_tensors_or_one_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "x.safetensors"
    good = safetensors(ONE, b"\0" * 4)
    place = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(data.draw(st.sampled_from([bytes(flipped), good[:place]])))
    try:
        found, _ = checkpoint.read_safetensors(path)
    except UserError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())


def test_an_honest_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """A header of 640 bytes begins with the bytes 80 02, as a pickle does."""
    path = tmp_path / "x.safetensors"
    for length, start in ((640, b"\x80\x02"), (0x4B50, b"PK")):
        path.write_bytes(safetensors(ONE.ljust(length), b"\0" * 4))
        assert path.read_bytes()[:2] == start
        assert list(checkpoint.read_safetensors(path)[0]) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = checkpoint.save(tmp_path / "step-000001", tensors(), {})
        checkpoint.write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    for path in [*folder.iterdir(), tmp_path / "x.safetensors"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_metadata_comes_back_and_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "x.safetensors"
    turned = torch.arange(6.0).reshape(2, 3).T
    checkpoint.write_safetensors(path, {"a": turned}, {"key": "value"})
    assert checkpoint.read_safetensors(path)[1] == {"key": "value"}
    assert torch.equal(load_file(path)["a"], turned)


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_bytes(b"old")
    link.symlink_to(real)
    checkpoint.write_safetensors(link, {"a": torch.ones(1)})
    assert link.is_symlink()
    assert list(checkpoint.read_safetensors(real)[0]) == ["a"]


def test_a_full_disk_names_path_and_bytes_and_spoils_nothing(folder: Path) -> None:
    """The limit on a file's size stands for the full disk: the writes fail in the same way."""
    single = folder.parent / "x.safetensors"
    checkpoint.write_safetensors(single, {"a": torch.ones(1)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        large = {"a": torch.ones(100_000)}
        with pytest.raises(UserError, match="400000 bytes needed") as caught:
            checkpoint.save(folder, {"adapter": large}, {})
        with pytest.raises(UserError, match="400000 bytes needed"):
            checkpoint.write_safetensors(single, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoint.read(folder).meta["step"] == 10
    assert checkpoint.read_safetensors(single)[0]["a"].tolist() == [1.0]
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, single.name]


def test_room_is_looked_for_before_anything_is_written(folder: Path) -> None:
    """A tensor of a petabyte that takes no memory: no disk here has as much."""
    endless = {"a": torch.zeros(1).expand(2**48)}
    needed = 2**50 + 100_161  # the tensor, facts and manifest, a line in a header
    with pytest.raises(UserError, match=rf"step-000010: cannot be written: {needed} bytes"):
        checkpoint.save(folder, {"adapter": endless}, {})
    assert checkpoint.read(folder).meta["step"] == 10
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_kill_between_the_two_renames_loses_nothing(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.replaced"))
    checkpoint.save(folder.with_name("step-000020"), tensors(), {})
    assert [path.name for path in checkpoint.steps(folder.parent)] == ["step-000010", "step-000020"]
    assert checkpoint.read(folder).meta["step"] == 10


def test_meta_that_is_no_json_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "step-000001", tensors(), {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
