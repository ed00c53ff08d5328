"""A run's curves for TensorBoard, an optional extra."""

import shutil
from pathlib import Path
from typing import Any

from pflbench.engine.experiment import Experiment
from pflbench.engine.observers import Observer
from pflbench.errors import UsageError


class Log(Observer):
    """Writes each round's numbers to `out/tensorboard/<id>`. Raises `UsageError` when TensorBoard is not installed."""

    def __init__(self, out: Path, *, resume: bool) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("log: TensorBoard is not installed; pip install 'pflbench[tensorboard]'") from None
        self._make = SummaryWriter
        self._out = out / "tensorboard"
        self._resume = resume
        self._writer: Any = None

    def start(self, experiment: Experiment) -> None:
        """Open the run's log. A resumed run adds to its log; every other run replaces it."""
        folder = self._out / experiment.id
        if folder.exists() and not self._resume:
            shutil.rmtree(folder)
        self._writer = self._make(str(folder))

    def round(self, row: dict[str, Any]) -> None:
        """Write one line of rounds.jsonl."""
        self._write(row, "")

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write one line of evaluations.jsonl; the names of its costs start with "evaluation/"."""
        work = ("steps", "forward", "backward", "seconds", "busy_seconds")
        self._write({name: value for name, value in row.items() if name not in work}, "")
        self._write({name: row[name] for name in (*work, "round")}, "evaluation/")

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "round":
                self._writer.add_scalar(prefix + name, value, row["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the log, if it is open."""
        if self._writer is not None:
            self._writer.close()
