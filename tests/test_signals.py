"""Ctrl-C and SIGTERM: one line, the exit code of the signal, and no remaining processes."""

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"
REMEDY = "continue a run with --resume, and a sweep by starting it again"


def heed() -> None:
    """Let SIGINT interrupt a process that is about to start: a job in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "parent"])
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["int", "term"],
)
def test_interrupted(
    quick: list[str],
    tmp_path: Path,
    environment: Callable[..., dict[str, str]],
    children: Callable[[int], set[int]],
    alive: Callable[[Iterable[int]], set[int]],
    eventually: Callable[..., bool],
    number: signal.Signals,
    code: int,
    word: str,
    whole_group: bool,
) -> None:
    with subprocess.Popen(
        [PFLBENCH, "run", *quick, "--rounds", "100000", "--workers", "2"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=heed,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while not process.stderr.readline().startswith("round 2/"):
                assert process.poll() is None
            workers = children(process.pid)
            assert len(workers) == 2
            (os.killpg if whole_group else os.kill)(process.pid, number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    assert out == ""
    lines = [line for line in err.splitlines() if line and not line.startswith("round ")]
    assert lines == [f"Error: {word}; {REMEDY}"]
    assert eventually(lambda: not alive(workers), seconds=10)
    assert [path.suffixes for path in (tmp_path / "runs").glob("[!.]*")] == [[".partial"]]  # it has no owner


STARTING = """
import os, signal, threading, time
from multiprocessing.process import BaseProcess
from pflbench.cli import main

start, kill = BaseProcess.start, BaseProcess.kill
number = signal.Signals[os.environ["NUMBER"]]

def started(self):
    start(self)  # the child is not stored yet, and has not set its signal handlers
    os.killpg(0, number)

def killed(self):
    os.killpg(0, number)  # a second signal, as `timeout` sends it
    kill(self)

BaseProcess.start, BaseProcess.kill = started, killed
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()  # OpenMP has some, at times; they get signals
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
@pytest.mark.parametrize("command", [["run", "--workers", "2"], ["sweep", "--jobs", "2", "--seed", "0", "--seed", "1"]])
@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_interrupted_while_processes_are_started(
    quick: list[str],
    tmp_path: Path,
    environment: Callable[..., dict[str, str]],
    command: list[str],
    number: str,
    code: int,
    word: str,
) -> None:
    name, *options = command
    with subprocess.Popen(
        [sys.executable, "-P", "-c", STARTING, name, *quick, *options, "--rounds", "100000"],
        cwd=tmp_path, env=environment(NUMBER=number), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=heed,
    ) as process:  # fmt: skip
        try:
            _, err = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of its session
    assert process.returncode == code
    assert [line for line in err.splitlines() if line.startswith("Error") or "Traceback" in line] == [
        line for line in err.splitlines() if line.startswith(f"Error: {word};")
    ]


REPLACED = """
import signal
from pflbench.engine import runner
from pflbench.cli import main

def run(*_args, **_options):
    try:
        signal.raise_signal(signal.NUMBER)
    except BaseException:
        raise ValueError from None  # so does torch's C++ at some places

runner.run = run
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_interrupted_where_another_exception_comes_of_it(
    quick: list[str], tmp_path: Path, environment: Callable[..., dict[str, str]], number: str, code: int, word: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", REPLACED.replace("NUMBER", number), "run", *quick],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
        preexec_fn=heed,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, f"Error: {word}; {REMEDY}\n")
