import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pflbench import datasets
from pflbench.datasets.dataset import Dataset
from pflbench.errors import UsageError


def test_list_names_every_source_in_order():
    wanted = ["auto", "cifar10", "cifar100", "fashion-mnist", "synthetic10", "synthetic100", "folder:PATH"]
    assert list(datasets.DATASETS) == wanted
    assert all("\n" not in line for line in datasets.DATASETS.values())


def test_importing_the_package_loads_no_heavy_module(tmp_path):
    code = (
        "import sys, pflbench.datasets; print(*{'torch', 'torchvision', 'numpy', 'matplotlib', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_default_data_dir(monkeypatch):
    monkeypatch.setenv("PFLBENCH_DATA", "/some/where")
    assert datasets.default_data_dir() == Path("/some/where")
    monkeypatch.delenv("PFLBENCH_DATA")
    assert datasets.default_data_dir().name == "pflbench"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "synthetic10", "synthetic100"])
def test_plain_names_stand_for_themselves(name, tmp_path):
    assert datasets.resolve(name, tmp_path, notice=pytest.fail) == name


def test_unknown_names_get_a_suggestion(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        datasets.resolve("cifar-10", tmp_path, notice=pytest.fail)
    with pytest.raises(UsageError, match="did you mean 'synthetic10'"):
        datasets.load("syntetic10", tmp_path)
    with pytest.raises(UsageError, match="resolve it first"):
        datasets.load("auto", tmp_path)


def test_fingerprint_sees_pixels_labels_shape_and_split():
    images = np.zeros((4, 2, 3, 1), np.uint8)
    labels = np.array([0, 1, 0, 1])
    base = Dataset("d", ("a", "b"), images, labels, 2)
    assert Dataset("other name", ("a", "b"), images.copy(), labels.copy(), 2).fingerprint == base.fingerprint
    changed = images.copy()
    changed[3, 1, 2, 0] = 1
    others = [
        Dataset("d", ("a", "b"), changed, labels, 2),
        Dataset("d", ("a", "b"), images, 1 - labels, 2),
        Dataset("d", ("a", "b"), images.reshape(4, 3, 2, 1), labels, 2),
        Dataset("d", ("a", "b"), images, labels, 3),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5
