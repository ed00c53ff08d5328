"""Devices: what is proven on a pretend device, and what is said where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

import pflbench
from pflbench import Execution, UsageError
from pflbench.core import device
from pflbench.core.device import Device, Devices


@pytest.mark.parametrize(
    "chosen", ["computes_the_same", "independent_of_its_steps", "worker", "not (the_same or independent_of or worker)"]
)
def test_the_checks_on_a_pretend_device_pass(chosen):
    # torch's backward pass knows only the devices that existed before its first use. A process that has used it on a
    # device cannot fork workers that do. So the checks need processes of their own.
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", chosen]
    done = subprocess.run([*line, Path(__file__).with_name("check_device.py")], capture_output=True, text=True)
    if "has no backends in Python" in done.stdout:
        pytest.skip("this torch has no backends in Python")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_without_such_a_device_nothing_is_written_and_one_line_says_what_torch_sees(tmp_path, executor):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match=r"device: (this )?torch.* leave --device out") as error:
        pflbench.run(toy.spec("fedavg"), toy.federation(), toy.net(), executor=executor, device="cuda", out=tmp_path)
    assert "\n" not in str(error.value)
    assert torch.__version__ in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("cud", "unknown device 'cud'; did you mean 'cuda'?"),
        ("cuda:1", "device: give 'cuda', not 'cuda:1'; CUDA_VISIBLE_DEVICES chooses among GPUs"),
        ("auto", "unknown device 'auto'"),
    ],
)
def test_an_unknown_device_is_refused(name, message):
    with pytest.raises(UsageError) as error:
        Execution(device=name).check()
    assert str(error.value).startswith(message)


def test_a_process_that_used_the_device_cannot_fork_workers_for_it(monkeypatch):
    monkeypatch.setattr("pflbench.engine.execution.in_use", lambda: "cuda")
    with pytest.raises(UsageError, match="this process has used cuda already"):
        Execution(device="cuda").devices()


def test_a_search_for_devices_that_kills_torch_is_one_line(monkeypatch):
    monkeypatch.setitem(device.TYPES, "pretend", lambda: os._exit(3))
    with pytest.raises(UsageError, match="pretend cannot be used: torch ended with exit code 3"):
        Execution(device="pretend").devices()
    monkeypatch.setitem(device.TYPES, "pretend", lambda: 1 / 0)
    with pytest.raises(UsageError, match="pretend cannot be used: division by zero"):
        Execution(device="pretend").devices()


def test_exact_computing_is_set_and_restored_and_only_on_a_device():
    backends = torch.backends

    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(), backends.cudnn.allow_tf32, backends.cudnn.deterministic,
            backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32,
            torch.utils.deterministic.fill_uninitialized_memory,
        )  # fmt: skip

    before = settings()
    with Device("cuda").exact():
        assert settings() == (True, False, True, False, False, False)
    assert settings() == before
    with Device().exact():
        assert settings() == before
    assert not torch.cuda.is_initialized()


def test_devices_are_dealt_to_workers_in_turn():
    assert [Devices("cuda", 2).of(i).index for i in range(5)] == [0, 1, 0, 1, 0]
    assert str(Device("cuda", 3).torch) == "cuda:3"
    assert Devices().of(7).torch == torch.device("cpu")


def test_without_ray_and_with_another_address_in_the_environment_there_is_one_line(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"executor: ray needs Ray; pip install 'pflbench\[ray\]'"):
            Execution("ray").check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match=r"no --ray-address, but the environment has RAY_ADDRESS=10\.0"):
        Execution("ray").check()
    with pytest.raises(UsageError, match=r"there is --ray-address 10\.0\.0\.2:6379, but"):
        Execution("ray", ray_address="10.0.0.2:6379").check()
    Execution("ray", ray_address="10.0.0.1:6379").check()


def test_nothing_of_ray_or_cuda_is_imported_or_used_unless_it_is_asked_for(environment):
    code = (
        "import sys, pflbench, torch\n"
        "pflbench.run(pflbench.RunSpec(algo='local', dataset='synthetic10', model='mlp', rounds=1), workers=1)\n"
        "print('ray' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
