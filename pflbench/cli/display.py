"""What a run shows while it goes on, and when it is done."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from pflbench.spec import RunSpec
from pflbench.store.record import Record
from pflbench.sweep.runner import Event, labels


class Progress:
    """A bar on a terminal, plain lines elsewhere (both on standard error), nothing when `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self.started = False
        self._quiet = quiet
        self._rounds = 0
        self._accuracy = ""
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.started:
            self._bar.stop()

    def start(self, spec: RunSpec) -> None:
        """Show what is run, before the first round (and after the workers were forked: the bar has a thread)."""
        self.started = True
        self._rounds = spec.rounds
        if not self._quiet:
            text = f"{spec.algo} on {spec.dataset}: {spec.describe_partition()}, {spec.joining} a round"
            self._console.print(text, highlight=False, soft_wrap=True)
        self._bar.start()
        self._bar.add_task("", total=self._rounds, accuracy="")

    def round(self, row: dict[str, Any]) -> None:
        """Show one line of rounds.jsonl."""
        if "accuracy" in row:
            self._accuracy = percent(row["accuracy"])
        self._bar.update(self._bar.task_ids[0], completed=row["round"], accuracy=self._accuracy)
        if self._bar.disable and not self._quiet:
            done = f"round {row['round']}/{self._rounds}  accuracy {self._accuracy or '-'}  {row['seconds']:.1f} s"
            self._console.print(done, highlight=False, soft_wrap=True)


class Sweeping:
    """One display for all runs of a sweep: a bar over their rounds, and a line for each run that ends."""

    def __init__(self, specs: Sequence[RunSpec], found: Mapping[str, str | None], *, quiet: bool) -> None:
        self._label = {spec.id: text for spec, text in zip(specs, labels(specs), strict=True)}
        self._left = [spec for spec in specs if found[spec.id] is None]
        self._accuracy: dict[str, float] = {}
        self._ended = 0
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("runs {task.fields[runs]}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        if not quiet:
            self._print(f"{len(specs)} runs: {len(specs) - len(self._left)} are there, {len(self._left)} to do")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        total = sum(spec.rounds for spec in self._left)
        self._task = self._bar.add_task("", total=total, runs=f"0/{len(self._left)}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def event(self, event: Event) -> None:
        """Show what happened to a run."""
        run = event.spec.id
        if event.kind == "started":
            self._bar.start()  # a thread: after the first fork
        elif event.kind == "round":
            assert event.row is not None  # noqa: S101
            self._accuracy[run] = event.row.get("accuracy", self._accuracy.get(run))
            self._bar.advance(self._task)
        else:
            self._ended += 1
            self._bar.update(self._task, runs=f"{self._ended}/{len(self._left)}")
            if not self._quiet and event.kind != "there":
                how = percent(self._accuracy.get(run)) if event.kind == "done" else f"failed: {event.reason}"
                self._print(f"{self._ended}/{len(self._left)}  {run}  {self._label[run]}  {how}")


def percent(value: float | None) -> str:
    """Return a fraction as text, in percent."""
    return "-" if value is None else f"{100 * value:.2f} %"


def table(record: Record) -> None:
    """Print the short table that ends a run."""
    summary = record.summary
    spec = record.spec
    out = Table(
        title=f"{spec.algo} on {spec.dataset}: {spec.describe_partition()}, seed {spec.seed}",
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
    ):
        if "last" in summary:
            out.add_row(text, percent(summary["last"][name]), percent(summary["last5"][name]))
    mega = [f"{summary[name] / 1e6:,.1f} MB" for name in ("bytes_up", "bytes_down")]
    out.add_row("sent up / down", *mega)
    seconds = summary["seconds"]
    out.add_row("time", f"{seconds:.1f} s", f"{seconds / max(summary['rounds'], 1):.2f} s a round")
    if seconds:
        busy = summary["busy_seconds"] / (seconds * record.machine["workers"])
        out.add_row(f"  of which {record.machine['workers']} workers computed", f"{100 * busy:.0f} %", "")
    console = Console()
    console.print(out)
    console.print(f"record: {record.path}", highlight=False, soft_wrap=True)
