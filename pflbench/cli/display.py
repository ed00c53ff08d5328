"""The display of a run or a sweep: progress, and a table at the end."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import rich.box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from pflbench.core import registry
from pflbench.engine.observers import Observer
from pflbench.spec import RunSpec
from pflbench.sweep.suite import labels

if TYPE_CHECKING:
    from pflbench.engine.experiment import Experiment
    from pflbench.store.record import Record
    from pflbench.sweep.runner import Event


def console() -> Console:
    """Return standard output for tables. If it is not a terminal, tables are not wrapped."""
    found = Console()
    if not found.is_terminal:
        found.width = 200
    return found


def _bar(console: Console, *columns: ProgressColumn, quiet: bool) -> Bar:
    """Return a progress bar with `columns` and the times; it shows nothing when `quiet` or without a terminal."""
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True))
    return Bar(*columns, *times, console=console, disable=quiet or not console.is_terminal)


class Progress(Observer):
    """A bar on a terminal, plain lines elsewhere (both on standard error), nothing when `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self.started = False
        self._quiet = quiet
        self._rounds = 0
        self._waiting: tuple[str, int] | None = None
        self._console = Console(stderr=True)
        accuracy = TextColumn("accuracy {task.fields[accuracy]}")
        self._bar = _bar(self._console, TextColumn("round"), MofNCompleteColumn(), BarColumn(), accuracy, quiet=quiet)

    def close(self) -> None:
        """End the bar."""
        self._flush()
        self._bar.stop()

    def start(self, experiment: "Experiment") -> None:
        """Show which run starts. The bar has a thread, so it starts after the workers were forked."""
        self.started = True
        spec = experiment.spec
        self._rounds = spec.rounds
        if not self._quiet:
            text = f"{_name(spec)}, {spec.joining} a round"
            self._console.print(text, highlight=False, soft_wrap=True)
        self._bar.start()
        self._bar.add_task("", total=self._rounds, accuracy="")

    def round(self, row: dict[str, Any]) -> None:
        """Show a round of training. Without a bar, its line is printed when the accuracy is known, or later."""
        self._bar.update(self._bar.task_ids[0], completed=row["round"])
        self._flush()
        self._waiting = f"{row['seconds']:.1f} s", row["round"]

    def evaluation(self, row: dict[str, Any]) -> None:
        """Show the accuracy after a round."""
        accuracy = percent(row["accuracy"])
        self._bar.update(self._bar.task_ids[0], accuracy=accuracy)
        self._flush(accuracy)

    def _flush(self, accuracy: str = "-") -> None:
        """Print the pending line, if any."""
        if self._waiting is not None and self._bar.disable and not self._quiet:
            seconds, number = self._waiting
            text = f"round {number}/{self._rounds}  accuracy {accuracy}  {seconds}"
            self._console.print(text, highlight=False, soft_wrap=True)
        self._waiting = None


class Sweeping:
    """The display of a sweep: a bar over the rounds of all runs, and a line for each run that ends."""

    def __init__(self, runs: "Sequence[Experiment]", found: Mapping[str, str | None], *, quiet: bool) -> None:
        texts = labels([run.spec for run in runs])
        self._label = {run.id: text for run, text in zip(runs, texts, strict=True)}
        self._left = [run for run in runs if found[run.id] is None]
        self._accuracy: dict[str, float] = {}
        self._ended = 0
        self._quiet = quiet
        self._console = Console(stderr=True)
        percentage = TextColumn("{task.percentage:.0f} %")
        self._bar = _bar(self._console, TextColumn("runs {task.fields[runs]}"), BarColumn(), percentage, quiet=quiet)
        if not quiet:
            self._print(counts(found))

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        total = sum(run.spec.rounds for run in self._left)
        self._task = self._bar.add_task("", total=total, runs=f"0/{len(self._left)}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def event(self, event: "Event") -> None:
        """Show what happened to a run."""
        run = event.run.id
        if event.kind == "started":
            self._bar.start()  # the bar has a thread, so it starts after the first fork
        elif event.kind == "round":
            self._bar.advance(self._task)
        elif event.kind == "evaluation":
            assert event.row is not None  # noqa: S101
            self._accuracy[run] = event.row["accuracy"]
        elif event.kind == "lost":
            if not self._quiet:
                self._print(f"{run}  {self._label[run]}  {event.reason}; it is started again")
        else:
            self._ended += 1
            self._bar.update(self._task, runs=f"{self._ended}/{len(self._left)}")
            if not self._quiet and event.kind != "there":
                how = percent(self._accuracy.get(run)) if event.kind == "done" else f"failed: {event.reason}"
                self._print(f"{self._ended}/{len(self._left)}  {run}  {self._label[run]}  {how}")


def counts(found: Mapping[str, str | None]) -> str:
    """Return in words how many runs have a record: `found` has each run's status, None if it has no record."""
    missing = sum(status is None for status in found.values())
    return f"{len(found)} runs: {len(found) - missing} recorded, {missing} to do"


def percent(value: float | None) -> str:
    """Return a fraction as text, in percent."""
    return "-" if value is None else f"{100 * value:.2f} %"


def table(record: "Record") -> None:
    """Print the results of a run."""
    summary = record.summary
    spec = record.spec
    out = Table(
        title=f"{_name(spec)}, seed {spec.seed}",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    out.add_column("after the last round" if "last" in summary else "no evaluation")
    out.add_column("last", justify="right")
    out.add_column("mean of last 5", justify="right")
    for name, text in (
        ("accuracy", "accuracy, weighted by samples"),
        ("accuracy_mean", "accuracy, mean of clients"),
        ("accuracy_std", "  std over clients"),
        ("accuracy_worst10", "  worst 10 % of clients"),
        ("global_accuracy", "accuracy of the global model"),
        ("own_accuracy", "accuracy of the clients' own models"),
        ("own_accuracy_worst10", "  worst 10 % of clients"),
    ):
        if name in summary.get("last", {}):
            out.add_row(text, percent(summary["last"][name]), percent(summary["last5"][name]))
    mega = [f"{summary[name] / 1e6:,.1f} MB" for name in ("bytes_up", "bytes_down")]
    out.add_row("uploads / downloads", *mega)
    seconds, evaluation = summary["seconds"], summary["evaluation"]
    out.add_row("time of training", f"{seconds:.1f} s", f"{seconds / max(summary['rounds'], 1):.2f} s a round")
    if evaluation["seconds"]:  # a record of schema 1 has it in the time of training
        each = evaluation["seconds"] / len(record.evaluations)
        out.add_row("time of evaluations", f"{evaluation['seconds']:.1f} s", f"{each:.2f} s each")
    if seconds:
        workers = record.machine["workers"]
        busy = (summary["busy_seconds"] + (evaluation["busy_seconds"] or 0.0)) / (
            (seconds + (evaluation["seconds"] or 0.0)) * workers
        )
        out.add_row(f"  share in which {workers} workers computed", f"{100 * busy:.0f} %", "")
    console = Console()
    console.print(out)
    console.print(f"record: {record.path}", highlight=False, soft_wrap=True)


def _name(spec: RunSpec) -> str:
    return f"{registry.title(spec.algo)} on {spec.dataset}: {spec.describe_partition()}"
