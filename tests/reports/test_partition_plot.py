import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pflbench.reports.partition_plot import draw


def counts_of(clients, classes):
    counts = np.random.RandomState(0).poisson(3, (clients, classes)) ** 3
    counts[0, 0] = 1000
    return counts


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (20, 100), (500, 10)])
def test_writes_png_and_svg_of_bounded_size(tmp_path, clients, classes):
    png, svg = tmp_path / "p.png", tmp_path / "p.svg"
    draw(counts_of(clients, classes), [f"kind{i}" for i in range(classes)], "a title", [png, svg])
    with Image.open(png) as image:
        assert image.width <= 2200
        assert image.height <= 1500
    assert svg.read_text().startswith("<?xml")


def test_same_counts_same_svg_bytes(tmp_path):
    for size in ((6, 4), (60, 2)):
        paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
        for path in paths:
            draw(counts_of(*size), [f"kind{i}" for i in range(size[1])], "t", [path])
        first, second = (path.read_bytes() for path in paths)
        assert first == second


def test_bubbles_up_to_50_by_30_then_a_heat_map(tmp_path):
    def has_bitmap(clients, classes):
        path = tmp_path / "p.svg"
        draw(counts_of(clients, classes), [f"kind{i}" for i in range(classes)], "t", [path])
        return "<image" in path.read_text()

    # The heat map and its colour bar are embedded bitmaps; bubbles are paths.
    assert not has_bitmap(50, 30)
    assert has_bitmap(51, 1)
    assert has_bitmap(1, 31)


def test_no_torch_and_no_pyplot(tmp_path):
    code = (
        "import sys, pathlib, numpy as np; from pflbench.reports.partition_plot import draw;"
        "assert 'matplotlib' not in sys.modules;"
        "draw(np.eye(3, dtype=int), 'abc', 't', [pathlib.Path(sys.argv[1])]);"
        "print(*{'torch', 'matplotlib.pyplot'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, "p.png"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "\n", done.stderr
