from pathlib import Path

import numpy as np
import pytest
import torch

from pflbench import datasets

PINNED = {
    "synthetic10": "d9326547ab84f64615564a405a50458df68f75cdd26d9d936be73663b79c2e7d",
    "synthetic100": "25a160f5c5af993d44fa901f0d7a8edd0a4fb552df8c9e89931abbf62b280c69",
}


@pytest.fixture(scope="module")
def data():
    return {name: datasets.load(name, Path("unused")) for name in PINNED}


@pytest.mark.parametrize("name", PINNED)
def test_content_never_changes(data, name):
    assert data[name].fingerprint == PINNED[name]


@pytest.mark.parametrize(("name", "classes", "n_train", "n"), [
    ("synthetic10", 10, 10_000, 12_000), ("synthetic100", 100, 20_000, 24_000)
])  # fmt: skip
def test_shapes_and_equal_classes(data, name, classes, n_train, n):
    made = data[name]
    assert made.name == name
    assert made.images.shape == (n, 32, 32, 3)
    assert made.images.dtype == np.uint8
    assert made.images.flags.c_contiguous
    assert made.labels.dtype == np.int64
    assert made.n_train == n_train
    assert len(set(made.classes)) == classes
    assert (np.bincount(made.labels[:n_train]) == n_train // classes).all()
    assert (np.bincount(made.labels[n_train:]) == (n - n_train) // classes).all()


def test_no_image_is_there_twice(data):
    for made in data.values():
        assert len({image.tobytes() for image in made.images}) == len(made.images)


def test_a_linear_model_fails_on_pixels(data):
    """Multinomial logistic regression, its best test accuracy over all epochs: above chance, below 60 %."""
    made = data["synthetic10"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        images = torch.from_numpy(made.images.reshape(len(made.images), -1)).float() / 127.5 - 1
        labels = torch.from_numpy(made.labels)
        model = torch.nn.Linear(3072, 10)
        adam = torch.optim.Adam(model.parameters(), lr=3e-4)
        best = 0.0
        for _ in range(5):
            for rows in torch.randperm(made.n_train).split(100):
                adam.zero_grad()
                torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                adam.step()
            with torch.no_grad():
                right = model(images[made.n_train :]).argmax(1) == labels[made.n_train :]
            best = max(best, right.float().mean().item())
    finally:
        torch.set_num_threads(threads)
    assert 0.15 < best < 0.60
