import io

import numpy as np
import pytest
from PIL import Image
from refusals import refusal

from pflbench import datasets
from pflbench.errors import UsageError


def put(path, value, mode="RGB", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "pets"
    put(root / "train" / "cat" / "b.png", (1, 2, 3))
    put(root / "train" / "cat" / "a.png", (4, 5, 6))
    put(root / "train" / "dog" / "a.PNG", (7, 8, 9))
    put(root / "test" / "dog" / "a.png", (10, 11, 12))
    return root


@pytest.fixture
def resolve(tmp_path):
    return lambda path: datasets.resolve(f"folder:{path}", tmp_path / "cache", notice=pytest.fail)


def fails(resolve, path):
    return refusal(resolve, path)


def test_images_labels_and_classes_come_out_in_order(tree, resolve, tmp_path):
    name = resolve(tree)
    assert name.startswith("folder:pets@")
    data = datasets.load(name, tmp_path / "cache")
    assert data.name == name
    assert data.classes == ("cat", "dog")
    assert data.n_train == 3
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.labels.dtype == np.int64
    assert data.images.shape == (4, 4, 6, 3)
    assert data.images.dtype == np.uint8
    assert data.images.flags.c_contiguous
    assert data.images[:, 0, 0].tolist() == [[4, 5, 6], [1, 2, 3], [7, 8, 9], [10, 11, 12]]


def test_grey_trees_have_one_channel_mixed_ones_three(tree, resolve, tmp_path):
    grey = tmp_path / "grey"
    put(grey / "train" / "a" / "1.png", 5, mode="L")
    put(grey / "test" / "a" / "1.png", 1, mode="1")
    data = datasets.load(resolve(grey), tmp_path / "cache")
    assert data.images.shape == (2, 4, 6, 1)
    assert data.images[:, 0, 0, 0].tolist() == [5, 255]
    put(tree / "train" / "cat" / "grey.png", 77, mode="L")
    assert datasets.load(resolve(tree), tmp_path / "cache").images[2, 0, 0].tolist() == [77, 77, 77]


def test_name_follows_content_not_place_or_clutter(tree, resolve, tmp_path):
    name = resolve(tree)
    (tree / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / ".cache").mkdir()
    assert resolve(tree) == name
    moved = tree.rename(tmp_path / "animals")
    assert resolve(moved) == name.replace("pets", "animals")
    (moved / "train" / "cat" / "a.png").rename(moved / "train" / "dog" / "b.png")
    assert resolve(moved).split("@")[1] != name.split("@")[1]


def test_canonical_name_is_enough_once_cached(tree, resolve, tmp_path):
    name = resolve(tree)
    tree.rename(tmp_path / "gone")
    assert resolve(name.removeprefix("folder:")) == name
    with pytest.raises(UsageError, match="give its path as folder:PATH"):
        datasets.load("folder:pets@0123456789ab", tmp_path / "cache")
    assert "give its path" in fails(resolve, "pets@0123456789ab")


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_damaged_cache_is_rebuilt(tree, resolve, tmp_path, keep):
    name = resolve(tree)
    before = datasets.load(name, tmp_path / "cache").fingerprint
    (cache,) = (tmp_path / "cache" / "folders").iterdir()
    cache.write_bytes(cache.read_bytes()[:keep])
    with pytest.raises(UsageError, match="damaged"):
        datasets.load(name, tmp_path / "cache")
    assert resolve(tree) == name
    assert datasets.load(name, tmp_path / "cache").fingerprint == before


def test_flipped_bits_in_the_cache_are_noticed(tree, resolve, tmp_path):
    name = resolve(tree)
    (cache,) = (tmp_path / "cache" / "folders").iterdir()
    data = bytearray(cache.read_bytes())
    data[data.index(bytes([4, 5, 6] * 6))] ^= 1
    cache.write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        datasets.load(name, tmp_path / "cache")


def test_second_time_decodes_nothing(tree, resolve, monkeypatch):
    name = resolve(tree)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
    assert resolve(tree) == name


def test_nothing_half_written_stays_when_writing_fails(tree, resolve, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert "No space left" in fails(resolve, tree)
    assert list((tmp_path / "cache" / "folders").iterdir()) == []


@pytest.mark.parametrize("damage", [b"not an image", b""])
def test_broken_image_is_named(tree, resolve, damage):
    (tree / "train" / "dog" / "x.jpg").write_bytes(damage)
    assert f"{tree}/train/dog/x.jpg is not a readable image" in fails(resolve, tree)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_truncated_image_is_named(tree, resolve, kind):
    buffer = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    (tree / "test" / "dog" / f"x.{kind}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 3 // 4])
    assert f"test/dog/x.{kind} is not a readable image" in fails(resolve, tree)


def test_other_size_is_named_with_both_sizes(tree, resolve):
    put(tree / "train" / "dog" / "big.png", 0, size=(8, 5))
    message = fails(resolve, tree)
    assert "train/dog/big.png is 8x5" in message
    assert "train/cat/a.png is 6x4" in message


def test_16_bit_images_are_refused_not_clipped(tree, resolve):
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tree / "train" / "dog" / "deep.png")
    assert "train/dog/deep.png has more than 8 bits" in fails(resolve, tree)


def test_unreadable_file_is_named(tree, resolve):
    (tree / "train" / "dog" / "link.png").symlink_to(tree / "nowhere.png")
    assert f"cannot read {tree}/train/dog/link.png" in fails(resolve, tree)


def test_wrong_trees_are_explained(tree, resolve, tmp_path):
    assert "is not there" in fails(resolve, tmp_path / "nothing")
    assert "is not a folder" in fails(resolve, tree / "train" / "cat" / "a.png")
    put(tree / "test" / "bird" / "a.png", 0)
    assert "class 'bird' has images in" in fails(resolve, tree)
    (tree / "test").rename(tree / "validation")
    assert "has no folder test/" in fails(resolve, tree)
    (tree / "test" / "dog").mkdir(parents=True)
    assert f"{tree}/test holds no images" in fails(resolve, tree)
    (tree / "train").rename(tree / "training")
    assert "has no folder train/" in fails(resolve, tree)


def test_unresolved_path_is_not_loaded(tmp_path):
    with pytest.raises(UsageError, match="resolve it first"):
        datasets.load("folder:/some/where", tmp_path)
