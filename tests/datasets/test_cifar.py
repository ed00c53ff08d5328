import hashlib
import io
import pickle
import socket
import tarfile
import threading
import time

import numpy as np
import pytest
import torchvision.datasets as tv
from refusals import refusal

from pflbench import datasets
from pflbench.datasets import download

FOLDER = "cifar-10-batches-py"
URL_PATH = "/cifar-10-python.tar.gz"


def md5(data):
    return hashlib.md5(data).hexdigest()


def batch(labels):
    images = np.repeat(np.array(labels, np.uint8)[:, None], 3072, axis=1)
    images[:, :1024] += 100  # the red plane comes first
    return pickle.dumps({"data": images, "labels": labels})


@pytest.fixture
def archive(monkeypatch):
    """A tiny archive in the shape of CIFAR-10's, which torchvision takes for the real one."""
    files = {
        "data_batch_1": batch([0, 1, 2]),
        "data_batch_2": batch([3, 4]),
        "test_batch": batch([5, 6]),
        "batches.meta": pickle.dumps({"label_names": [f"kind{i}" for i in range(10)]}),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    packed = buffer.getvalue()
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(packed))
    monkeypatch.setattr(
        tv.CIFAR10, "train_list", [[name, md5(files[name])] for name in ("data_batch_1", "data_batch_2")]
    )
    monkeypatch.setattr(tv.CIFAR10, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setattr(download, "PROBE_SECONDS", 2.0)
    monkeypatch.setattr(download, "READ_SECONDS", 0.5)
    return packed


@pytest.fixture
def online(archive, monkeypatch, serve):
    """Serve `archive`, or other answers, under CIFAR-10's address."""

    def start(body=archive, **kwargs):
        monkeypatch.setattr(tv.CIFAR10, "url", serve({URL_PATH: body}, **kwargs) + URL_PATH)

    return start


@pytest.fixture
def offline(archive, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(tv.CIFAR10, "url", f"http://127.0.0.1:{port}{URL_PATH}")


def fails(data_dir):
    return refusal(datasets.load, "cifar10", data_dir)


def test_downloads_reads_and_asks_no_second_time(online, tmp_path, capsys, monkeypatch):
    online()
    data = datasets.load("cifar10", tmp_path / "new")
    assert data.name == "cifar10"
    assert data.classes == tuple(f"kind{i}" for i in range(10))
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert data.labels.dtype == np.int64
    assert data.n_train == 5
    assert data.images.shape == (7, 32, 32, 3)
    assert data.images.flags.c_contiguous
    assert data.images[3, 0, 0].tolist() == [103, 3, 3]
    assert capsys.readouterr().out == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FOLDER]
    assert socket.getdefaulttimeout() is None
    monkeypatch.setattr(tv.CIFAR10, "url", "http://127.0.0.1:9/")
    assert datasets.load("cifar10", tmp_path / "new").fingerprint == data.fingerprint


def test_offline_says_which_files_go_where(offline, tmp_path):
    message = fails(tmp_path)
    assert "Connection refused" in message
    assert f"put {FOLDER} (from cifar-10-python.tar.gz) into {tmp_path} or choose --dataset synthetic10" in message
    assert list(tmp_path.iterdir()) == []


def test_stalled_download_ends_and_leaves_nothing(online, tmp_path):
    online(stall_from_request=2)  # the probe is answered
    begun = time.monotonic()
    assert "timed out" in fails(tmp_path)
    assert time.monotonic() - begun < 10
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_server_that_never_answers_is_given_up(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(tv.CIFAR10, "url", f"http://127.0.0.1:{mute.getsockname()[1]}{URL_PATH}")
        begun = time.monotonic()
        assert "cannot be downloaded" in fails(tmp_path)
    assert time.monotonic() - begun < 5


def test_hanging_name_lookup_is_given_up(archive, tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(tv.CIFAR10, "url", "http://name.invalid/x")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [release.wait(10)][1:])
    begun = time.monotonic()
    assert "(no answer)" in fails(tmp_path)
    assert time.monotonic() - begun < 5
    release.set()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + bytes(9)])
def test_damaged_archive_is_refused_and_removed(archive, online, tmp_path, damage):
    online(damage(archive))
    assert "corrupted" in fails(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_page_is_named(online, tmp_path, monkeypatch):
    online()
    monkeypatch.setattr(tv.CIFAR10, "url", tv.CIFAR10.url + ".old")
    assert "Not Found" in fails(tmp_path)


def test_unwritable_place_is_an_error(online, tmp_path):
    online()
    (tmp_path / "file").write_text("")
    assert "cannot be downloaded" in fails(tmp_path / "file" / "data")


def test_interrupt_leaves_nothing(online, tmp_path, monkeypatch):
    online()

    def interrupted(self):
        (tmp_path / "seen").write_text(self.root)
        raise KeyboardInterrupt

    monkeypatch.setattr(tv.CIFAR10, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


def test_the_slower_of_two_downloads_takes_the_others_folder(online, tmp_path, monkeypatch):
    online()
    plain = tv.CIFAR10.download

    def overtaken(self):
        plain(self)
        monkeypatch.setattr(tv.CIFAR10, "download", plain)
        tv.CIFAR10(root=tmp_path, download=True)

    monkeypatch.setattr(tv.CIFAR10, "download", overtaken)
    assert len(datasets.load("cifar10", tmp_path).labels) == 7
    assert not list(tmp_path.glob(".download-*"))


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folder_is_named_and_never_unpickled(online, tmp_path, name, damage):
    online()
    datasets.load("cifar10", tmp_path)
    path = tmp_path / FOLDER / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = fails(tmp_path)
    assert f"{tmp_path / FOLDER} is damaged" in message
    assert "delete it" in message


def test_auto_takes_cifar10_where_it_can(online, tmp_path):
    online()
    assert datasets.resolve("auto", tmp_path, notice=pytest.fail, download=False) == "cifar10"
    assert list(tmp_path.iterdir()) == []
    assert datasets.resolve("auto", tmp_path, notice=pytest.fail) == "cifar10"
    assert (tmp_path / FOLDER).is_dir()


@pytest.mark.parametrize("fetch", [True, False])
def test_auto_falls_back_and_says_so_in_one_line(offline, tmp_path, fetch):
    said = []
    assert datasets.resolve("auto", tmp_path, notice=said.append, download=fetch) == "synthetic10"
    (line,) = said
    assert "\n" not in line
    assert f"CIFAR-10 is not in {tmp_path} and cannot be downloaded ([Errno" in line
    assert "using synthetic10 instead" in line


def test_auto_needs_no_network_where_cifar10_is_on_disk(online, offline, tmp_path):
    (tmp_path / FOLDER).mkdir()
    assert datasets.resolve("auto", tmp_path, notice=pytest.fail) == "cifar10"


def test_progress_goes_to_stderr(online, tmp_path, capsys, monkeypatch):
    online()
    plain = tv.CIFAR10.download
    monkeypatch.setattr(tv.CIFAR10, "download", lambda self: (print("Extracting"), plain(self)))  # noqa: T201
    datasets.load("cifar10", tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Extracting" in captured.err
