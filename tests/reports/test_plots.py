import re

import numpy as np
import pandas as pd
import pytest

from pflbench.core import registry
from pflbench.reports import plots, svg
from pflbench.reports.frames import load


def test_curves_have_the_training_up_to_each_evaluation(write, tmp_path):
    write(tmp_path, spread=0.0)
    data = plots.curves(load(tmp_path))
    assert data["round"].tolist() == [1, 2, 3, 4, 5]
    assert data["elapsed"].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert data["evaluating"].tolist() == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert data["megabytes"].tolist() == pytest.approx([0.003, 0.006, 0.009, 0.012, 0.015])
    assert set(data["method"]) == {"FedAvg"}


def test_a_band_is_drawn_only_over_rounds_that_all_seeds_have():
    data = pd.DataFrame(
        {"method": "m", "run": list("aabcdd"), "round": [1, 2, 1, 1, 1, 2], "accuracy": [0.1, 0.9, 0.3, 0.2, 0.6, 0.7],
         "megabytes": 1.0, "elapsed": [1.0, 2.0, 3.0, 5.0, 3.0, 4.0]}
    )  # fmt: skip
    rounds, _, seconds = plots.learning(data, plots.styles({"m": ""}), "a setting").axes
    for axes, x in ((rounds, 1.0), (seconds, 3.0)):
        assert axes.lines[0].get_xydata() == pytest.approx(np.array([[x, 30.0]]))
        (band,) = axes.collections[0].get_paths()
        assert band.get_extents().extents == pytest.approx([x, 10.0, x, 60.0])
    one = plots.learning(data[data["run"] == "d"], plots.styles({"m": ""}), "one seed").axes[2]
    assert one.lines[0].get_xydata() == pytest.approx(np.array([[3.0, 60.0], [4.0, 70.0]]))
    assert not one.collections


def test_forty_methods_are_told_apart_without_colour_and_families_share_a_hue():
    found = plots.styles({f"m{i:02}": "prototypes" if i % 2 else "mixture of models" for i in range(40)})
    assert len({(s.linestyle, s.marker) for s in found.values()}) == 40
    assert len({(s.glyph, s.hatch) for s in found.values()}) == 10
    assert len({s.color for s in found.values()}) == 4
    both = plots.styles({"a": "prototypes", "b": "mixture of models", "c": "prototypes", "d": "of a plugin"})
    assert len({s.color for s in both.values()}) == 4
    assert plots.styles({"a": "prototypes"})["a"] == both["a"]


def luminance(colour):
    """As WCAG 2 defines it."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return np.dot((0.2126, 0.7152, 0.0722), linear)


@pytest.mark.parametrize("page", ["#ffffff", "#14171a"])
def test_colours_are_readable_on_a_light_and_on_a_dark_page(page):
    families = ({registry.family(name) for name in registry.algorithms()} - {""}) | {"of a plugin"}
    for family in families:
        for style in plots.styles({str(i): family for i in range(4)}).values():
            low, high = sorted((luminance(style.color), luminance(page)))
            assert (high + 0.05) / (low + 0.05) >= 3, (family, style.color)


def test_a_plot_in_a_page_has_its_texts_as_text_in_the_pages_colours_and_ids_of_its_own():
    data = pd.DataFrame(
        {"method": "m", "run": "a", "round": [1, 2], "accuracy": [0.1, 0.9], "megabytes": 1.0, "elapsed": [1.0, 2.0]}
    )
    one, same, other = (
        svg.inline(plots.learning(data, plots.styles({"m": ""}), "t", costs=("round",)), name, 'a "title" & more')
        for name in ("one", "one", "other")
    )
    assert one == same
    assert ">accuracy, %</text>" in one
    assert "#000000" not in one
    assert "#ffffff" not in one
    assert 'role="img" aria-label="a &quot;title&quot; &amp; more"' in one
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:url\(#|href="#)([\w-]+)', one)) <= ids[0]


def test_all_known_families_have_a_hue_of_their_own():
    families = {registry.family(name) for name in registry.algorithms()} - {""}
    colours = {plots.styles({"m": family})["m"].color for family in families}
    assert len(colours) == len(families)


def test_rounds_have_integer_ticks():
    data = pd.DataFrame(
        {"method": "m", "run": "a", "round": [1, 2], "accuracy": [0.1, 0.9], "megabytes": 1.0, "elapsed": [1.0, 2.0]}
    )
    (axes,) = plots.learning(data, plots.styles({"m": ""}), "a setting", costs=("round",)).axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert axes.get_xlabel() == "round"


def test_the_clients_plot_leaves_out_what_is_not_there():
    figure = plots.clients({"a": np.array([0.1, np.nan, 0.3])}, plots.styles({"a": ""}), "title")
    assert figure.axes[0].get_xlabel() == "accuracy of a client, %"
