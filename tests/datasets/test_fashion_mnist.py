import gzip
import hashlib

import numpy as np
import pytest
import torchvision.datasets as tv
from refusals import refusal

from pflbench import datasets
from pflbench.datasets import fashion_mnist

PARTS = (("train", 5), ("t10k", 3))


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def content():
    random = np.random.RandomState(0)
    files = {}
    for part, n in PARTS:
        files[f"{part}-images-idx3-ubyte"] = random.randint(0, 256, (n, 28, 28)).astype(np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8)
    return files


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Four tiny packed files in torchvision's layout, with fitting checksums, and no system-wide copy."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    resources = []
    for name, array in content().items():
        packed = gzip.compress(idx(array), mtime=0)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(tv.FashionMNIST, "resources", sorted(resources, reverse=True))
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "none")
    return folder


def check(data):
    files = content()
    assert data.images.shape == (8, 28, 28, 1)
    assert data.images.flags.c_contiguous
    assert data.n_train == 5
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert np.array_equal(data.images[:5, ..., 0], files["train-images-idx3-ubyte"])
    assert np.array_equal(data.images[5:, ..., 0], files["t10k-images-idx3-ubyte"])
    assert len(data.classes) == 10


def fails(data_dir):
    return refusal(datasets.load, "fashion-mnist", data_dir)


def test_reads_packed_files(raw, tmp_path):
    check(datasets.load("fashion-mnist", tmp_path))


def test_reads_unpacked_files(raw, tmp_path):
    for path in raw.iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    check(datasets.load("fashion-mnist", tmp_path))


def test_reads_the_system_wide_copy_whose_packing_differs(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", raw)
    monkeypatch.setattr(tv.FashionMNIST, "resources", [(name, "0" * 32) for name, _ in tv.FashionMNIST.resources])
    check(datasets.load("fashion-mnist", tmp_path / "empty"))


def test_wrong_checksum_is_an_error(raw, tmp_path):
    path = raw / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8))))
    assert f"{path} is damaged (wrong checksum)" in fails(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "3919 values where its header says (5, 28, 28)"),
        (lambda data: data + b"x", "3921 values"),
        (lambda data: b"\x00\x00\x0d\x03" + data[4:], "not an IDX file"),
        (lambda data: data[:10], "not an IDX file"),
        (lambda data: b"", "not an IDX file"),
        (lambda data: data[:3] + b"\x01" + data[4:], "not an IDX file"),
    ],
)
def test_damaged_unpacked_files_are_named(raw, tmp_path, damage, words):
    packed = raw / "train-images-idx3-ubyte.gz"
    path = packed.with_suffix("")
    path.write_bytes(damage(gzip.decompress(packed.read_bytes())))
    packed.unlink()
    message = fails(tmp_path)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"plain", lambda data: data[:30] + bytes(40)])
def test_damaged_packing_is_an_error_in_the_system_wide_copy(raw, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", raw)
    path = raw / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is damaged" in fails(tmp_path / "empty")


def test_missing_file_is_named(raw, tmp_path):
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte[.gz] is missing" in fails(tmp_path)


@pytest.mark.parametrize("labels", [np.arange(4, dtype=np.uint8), np.full(5, 10, np.uint8)])
def test_labels_that_do_not_fit_are_an_error(raw, tmp_path, labels):
    (raw / "train-labels-idx1-ubyte.gz").unlink()
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    assert "do not fit together" in fails(tmp_path)


def test_downloads_what_is_missing(raw, tmp_path, monkeypatch, serve):
    address = serve({f"/{path.name}": path.read_bytes() for path in raw.iterdir()})
    monkeypatch.setattr(tv.FashionMNIST, "mirrors", [address + "/"])
    fresh = tmp_path / "fresh"
    check(datasets.load("fashion-mnist", fresh))
    assert [path.name for path in fresh.iterdir()] == ["FashionMNIST"]


def test_offline_error_names_both_places_and_the_package(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(tv.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    message = fails(tmp_path / "fresh")
    for words in (f"{tmp_path}/fresh/FashionMNIST/raw", str(tmp_path / "none"), "apt install dataset-fashion-mnist"):
        assert words in message


@pytest.mark.skipif(not fashion_mnist.SYSTEM_DIR.exists(), reason="package dataset-fashion-mnist is not installed")
def test_the_real_files(tmp_path):
    data = datasets.load("fashion-mnist", tmp_path)
    assert data.images.shape == (70000, 28, 28, 1)
    assert np.bincount(data.labels[: data.n_train]).tolist() == [6000] * 10
    assert np.bincount(data.labels[data.n_train :]).tolist() == [1000] * 10
