"""A run's curves for TensorBoard, an optional extra."""

import shutil
from pathlib import Path
from typing import Any

from pflbench.errors import UsageError
from pflbench.spec import RunSpec


class Log:
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

    def start(self, spec: RunSpec) -> None:
        """Begin the run's log; a resumed one is gone on with."""
        folder = self._out / spec.id
        if folder.exists() and not self._resume:
            shutil.rmtree(folder)
        self._writer = self._make(str(folder))

    def round(self, row: dict[str, Any]) -> None:
        """Write one line of rounds.jsonl."""
        for name, value in row.items():
            if isinstance(value, int | float) and name != "round":
                self._writer.add_scalar(name, value, row["round"])
        self._writer.flush()

    def close(self) -> None:
        """End the log, if it was begun."""
        if self._writer is not None:
            self._writer.close()
