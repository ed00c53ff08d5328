"""The files in docs/adding-an-algorithm.md work without changes."""

import importlib
import re
import sys
from pathlib import Path

import oracle
import pytest
import torch
import toy

PAGE = (Path(__file__).parents[1] / "docs" / "adding-an-algorithm.md").read_text(encoding="utf-8")
FILES = [code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if code.startswith('"""')]


@pytest.fixture
def tutorial(methods, tmp_path, monkeypatch):
    """Import the files of the page, in its order."""
    monkeypatch.syspath_prepend(tmp_path)
    for i, code in enumerate(FILES):
        (tmp_path / f"tutorial_{i}.py").write_text(code, encoding="utf-8")
        sys.modules.pop(f"tutorial_{i}", None)  # `methods` has forgotten what it registered
        importlib.import_module(f"tutorial_{i}")
    assert {"my-fedprox", "my-fedper", "fedcm"} <= methods.keys()


def test_there_are_three_files():
    assert len(FILES) == 3


@pytest.mark.parametrize(("mine", "theirs"), [("my-fedprox", "fedprox"), ("my-fedper", "fedper")])
def test_the_tutorials_methods_are_ours_bit_by_bit(tutorial, mine, theirs):
    a, b = (toy.run(algo, shuffle=True, **toy.FULL) for algo in (mine, theirs))
    assert a.fingerprints["states"] == b.fingerprints["states"]
    assert a.fingerprints["metrics"] == b.fingerprints["metrics"]


@pytest.mark.parametrize("global_lr", [1.0, 0.5])
def test_two_rounds_of_fedcm_are_its_algorithm_2(tutorial, global_lr):
    record = toy.run("fedcm", {"alpha": 0.3, "global_lr": global_lr}, lr_decay=0.5)
    x_t = toy.initial()
    delta = {k: torch.zeros_like(t) for k, t in x_t.items()}
    for r in range(2):
        models, moves, lr = [], [], 0.1 * 0.5**r
        for x, y, _, _ in oracle.arrays():
            p, batches = x_t, oracle.batches(len(y), 3) * 2
            for b in batches:
                g = oracle.gradient(lambda q, b=b, x=x, y=y: oracle.nll(q, x[b], y[b]), p, tuple(p))
                p = {k: p[k] - lr * (0.3 * g[k] + 0.7 * delta[k]) for k in p}
            models.append(p)
            moves.append({k: (x_t[k] - p[k]) / (lr * len(batches)) for k in p})
        mean = oracle.mean(models, [1, 1])
        x_t = {k: x_t[k] + global_lr * (mean[k] - x_t[k]) for k in x_t}
        delta = oracle.mean(moves, [1, 1])
    oracle.close(record.server["model"], x_t)
    oracle.close(record.server["direction"], delta)
