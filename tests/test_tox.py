"""Every method has smoke environments, which run it."""

import importlib.util
from pathlib import Path

import pytest
import smoke

from pflbench.core import registry

ROOT = Path(__file__).parents[1]


def test_every_method_has_smoke_environments():
    pytest.importorskip("tox")
    spec = importlib.util.spec_from_file_location("toxfile", ROOT / "toxfile.py")
    assert spec is not None
    assert spec.loader is not None
    toxfile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toxfile)
    found = [smoke.parse(name) for name in toxfile.tox_extend_envs()]
    ours = [name for name in registry.algorithms() if (ROOT / "algorithms" / f"{name.replace('-', '_')}.py").exists()]
    assert found == [(name, alpha) for name in sorted(ours) for alpha in ("0.01", "0.1", "0.5", "1", "5")]
    assert "per-fedavg" in ours


def test_what_is_no_such_name_is_refused():
    with pytest.raises(SystemExit, match="'smoke-fedas' is not smoke-<method>-alpha<digits>"):
        smoke.parse("smoke-fedas")


def test_a_method_that_names_the_network_it_needs_gets_it(quick, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert smoke.main("smoke-fedbn-alpha1", *quick, "--model", "cnn", "--json") == 0
    shown = capfd.readouterr()
    assert "use --model resnet18, or --model cnn --norm batch" in shown.err
    assert '"norm": "batch"' in shown.out
