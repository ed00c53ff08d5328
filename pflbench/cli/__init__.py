"""The command line. Torch and everything heavy is imported when a command needs it, not before."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pflbench import settings
from pflbench.core import registry
from pflbench.errors import PflbenchError, UsageError, unknown
from pflbench.spec import MODELS, RunSpec

if TYPE_CHECKING:
    from pflbench.reports import Runs
    from pflbench.store.record import Record
    from pflbench.sweep.runner import Suite

Command = Callable[..., None]
_DATA_SETTINGS = (
    "dataset", "split", "partition", "alpha", "classes_per_client", "balanced", "min_samples", "clients", "seed",
    "partition_seed",
)  # fmt: skip
_OWN = ("executor", "workers", "out", "data_dir", "checkpoint_every")  # settings of `run` that results cannot depend on


class _Group(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise unknown("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


def _spec_options(names: tuple[str, ...] | None = None, *, many: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that adds an option for each setting of `RunSpec` (or for `names` only).

    With `many` each may be repeated, and has a value where `run` has a flag.
    """

    def add(command: Command) -> Command:
        known = settings.fields(RunSpec)
        for name in reversed([n for n in known if names is None or n in names]):
            kind, optional = settings.kind(RunSpec, name)
            field = known[name]
            default = "" if optional else f"  [default: {_shown(field.default)}]"
            limits = settings.bounds(field).replace(", given", "")
            text = f"{field.metadata['doc']}{f'; {limits}' if limits else ''}{default}"
            flag = "--" + name.replace("_", "-")
            if many:
                command = click.option(flag, name, metavar=kind.__name__.upper(), multiple=True, help=text)(command)
            elif kind is bool:
                command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(command)
            else:
                command = click.option(flag, name, metavar=kind.__name__.upper(), default=None, help=text)(command)
        return command

    return add


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_config_option = click.option("--config", metavar="FILE", help="TOML file of settings; the command line wins")
_data_option = click.option(
    "--data-dir", metavar="FOLDER", help="where datasets are  [default: $PFLBENCH_DATA or the user's cache folder]"
)
_json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON object")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="pflbench", message="pflbench %(version)s")
def cli() -> None:
    """Benchmark personalised federated learning."""


@cli.command()
@_spec_options()
@click.option("--set", "hyperparameters", metavar="NAME=VALUE", multiple=True, help="a hyperparameter of the method; "
              "`pflbench describe ALGO` names them; may be repeated")  # fmt: skip
@_config_option
@click.option("--executor", metavar="TEXT", help="processes or serial; the results are the same  [default: processes]")
@click.option("--workers", metavar="INT", help="worker processes, of one thread each  [default: one per core]")
@click.option("--out", metavar="FOLDER", help="where records are written  [default: runs]")
@_data_option
@click.option("--force", is_flag=True, help="run anew even if the record exists")
@click.option("--resume", is_flag=True, help="go on with an interrupted run, from its newest good checkpoint")
@click.option("--checkpoint-every", metavar="INT", help="rounds between checkpoints  [default: 1]")
@click.option("--log", metavar="TEXT", help="tensorboard: write the curves to OUT/tensorboard, too")
@click.option("--dry-run", is_flag=True, help="print the resolved settings and the run's id, and stop")
@click.option("--quiet", is_flag=True, help="no progress, no table")
@_json_option
def run(
    hyperparameters: tuple[str, ...],
    config: str | None,
    force: bool,
    resume: bool,
    log: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Run one experiment and record it.

    Without options: FedAS's published example, on CIFAR-10 if it is there, else on synthetic images.
    """
    values = _settings(config, given)
    chosen = {**values.pop("set", {}), **dict(_assignment(text) for text in hyperparameters)}
    own = {name: values.pop(name) for name in _OWN if name in values}
    spec = RunSpec.from_dict({**values, "hyperparameters": chosen})
    data_dir = _folder("data_dir", own.get("data_dir"))
    executor = str(own.get("executor", "processes"))
    workers = None if own.get("workers") is None else _integer("workers", own["workers"])
    checkpoint_every = _integer("checkpoint_every", own.get("checkpoint_every", 1))
    out = _folder("out", own.get("out")) or Path("runs")
    if log not in (None, "tensorboard"):
        raise unknown("log", log, ["tensorboard"])
    if dry_run:
        from pflbench.engine.engine import check_execution, resolve

        check_execution(executor, workers, checkpoint_every)
        spec = resolve(spec, data_dir=data_dir, notice=_notice, download=False)
        click.echo(json.dumps({"id": spec.id, "spec": spec.to_dict()}, indent=None if as_json else 2))
        return
    from pflbench.engine.executors.children import signals_held

    with signals_held():  # an exception is lost in what torch runs at its import
        from pflbench.engine import engine
    from pflbench.cli.display import Progress, table

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(quiet=quiet or as_json))
        watchers: list[Any] = [progress]
        if log is not None:
            from pflbench.cli.tensorboard import Log

            watchers.append(stack.enter_context(contextlib.closing(Log(out, resume=resume))))
        record = engine.run(
            spec,
            executor=executor,
            workers=workers,
            out=out,
            force=force,
            resume=resume,
            checkpoint_every=checkpoint_every,
            data_dir=data_dir,
            notice=_notice,
            on_start=lambda spec: _each(watchers, "start", spec),
            on_round=lambda row: _each(watchers, "round", row),
        )
    existed = not progress.started
    if as_json:
        click.echo(json.dumps({**record.to_dict(), "path": str(record.path), "existed": existed}))
    elif not quiet:
        if existed:
            click.echo(f"Run {record.id} exists already; this is its record. --force runs it anew.", err=True)
        table(record)
    _fail_unless_finished(record)


def _each(watchers: list[Any], event: str, value: Any) -> None:
    for watcher in watchers:
        getattr(watcher, event)(value)


def _fail_unless_finished(record: "Record") -> None:
    if record.status != "finished":
        raise PflbenchError(f"run {record.id} {record.status}: {record.reason}")


@cli.command("list")
@click.argument("what", type=click.Choice(["algorithms", "datasets", "models", "partitions"]))
@_json_option
def list_(what: str, as_json: bool) -> None:
    """List what can be chosen."""
    from pflbench import datasets
    from pflbench.datasets import partitioners

    found = {
        "algorithms": registry.algorithms(),
        "datasets": datasets.DATASETS,
        "models": MODELS,
        "partitions": partitioners.PARTITIONS,
    }[what]
    if as_json:
        click.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, text in found.items():
        click.echo(f"{name:{width}}  {text}")


@cli.command()
@click.argument("algorithm")
def describe(algorithm: str) -> None:
    """Describe a method: its paper, what is personal, which model is evaluated, its hyperparameters."""
    cls = registry.algorithm(algorithm)
    module = sys.modules[cls.__module__]
    click.echo((module.__doc__ or cls.__doc__ or "").strip())
    hyper = settings.fields(cls.Hyper)
    click.echo("Hyperparameters (--set name=value):" if hyper else "Hyperparameters: none.")
    for name, field in hyper.items():
        limits = settings.bounds(field)
        click.echo(f"  {name} = {_shown(field.default)}  {field.metadata['doc']}{f' ({limits})' if limits else ''}")


@cli.command()
@_spec_options(_DATA_SETTINGS)
@_config_option
@_data_option
@click.option("--out", metavar="FOLDER", help="where it is written  [default: partitions]")
@_json_option
def partition(config: str | None, data_dir: str | None, out: str | None, as_json: bool, **given: Any) -> None:
    """Show who gets which samples, and draw it, without training.

    Writes partition.png, partition.svg, counts.csv and the sample numbers, indices.npz, to FOLDER/<hashes of partition
    and dataset>/.
    """
    from pflbench.cli.partition import show

    values = {name: value for name, value in _settings(config, given).items() if name in _DATA_SETTINGS}
    spec = RunSpec.from_dict({**values, "join_ratio": 1.0})  # its default, not used here, needs 6 clients
    folder = _folder("out", out) or Path("partitions")
    show(spec, folder, _folder("data_dir", data_dir), _notice, as_json=as_json)


@cli.command()
@click.argument("suite", required=False)
@_spec_options(many=True)
@click.option("--jobs", metavar="INT", help="runs at once, of one worker each  [default: one per core]")
@click.option("--out", metavar="FOLDER", help="where records are written  [default: runs]")
@_data_option
@click.option("--retry", is_flag=True, help="run again what failed, and interrupted runs from the beginning")
@click.option("--dry-run", is_flag=True, help="print the plan, and stop")
@click.option("--quiet", is_flag=True, help="no progress")
@_json_option
def sweep(
    suite: str | None,
    jobs: str | None,
    out: str | None,
    data_dir: str | None,
    retry: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **given: tuple[str, ...],
) -> None:
    """Run a grid: SUITE, a TOML file or a ready suite, and every combination of the options, which may be repeated.

    Runs that are there already are not done again; a sweep that was interrupted is started again to go on.
    """
    from pflbench.cli.display import Sweeping
    from pflbench.engine.cores import cores
    from pflbench.sweep import runner as sweeps

    grid = {name: list(values) for name, values in given.items() if values}
    chosen = sweeps.Suite() if suite is None else _suite(suite)
    chosen = dataclasses.replace(chosen, grid={**chosen.grid, **grid})
    if not chosen.grid and not chosen.include:
        raise UsageError("sweep: nothing to run; give a suite, or options such as --algo fedas --algo fedavg")
    folder = _folder("out", out) or Path("runs")
    count = cores() if jobs is None else _integer("jobs", jobs)
    if count < 1:
        raise UsageError(f"jobs: {count} is out of bounds; it must be >= 1")
    data = _folder("data_dir", data_dir)
    specs = sweeps.plan(chosen.specs(), data, _notice, download=not dry_run)
    found = {spec.id: sweeps.status(spec, folder) for spec in specs}
    if retry:
        found = {run: status if status == "finished" else None for run, status in found.items()}
    missing = sum(status is None for status in found.values())
    if other := sweeps.of_other_code([spec for spec in specs if found[spec.id] == "finished"], folder):
        run, what = next(iter(other.items()))
        _notice(
            f"of the runs that are there, {len(other)} were made with other code ({run} with {what}); "
            "move them away to run them anew"
        )
    if dry_run:
        if as_json:
            click.echo(json.dumps([{"id": s.id, "status": found[s.id], "spec": s.to_dict()} for s in specs]))
            return
        for spec, label in zip(specs, sweeps.labels(specs), strict=True):
            click.echo(f"{spec.id}  {found[spec.id] or 'to do'}  {label}")
        click.echo(f"{len(specs)} runs: {len(specs) - missing} are there, {missing} to do")
        return
    from pflbench.store.record import check_out

    check_out(folder)
    with Sweeping(specs, found, quiet=quiet or as_json) as progress:
        failed = sweeps.run(specs, folder, jobs=count, data_dir=data, retry=retry, on_event=progress.event)
    if as_json:
        ended = {spec.id: sweeps.status(spec, folder) for spec in specs}
        click.echo(
            json.dumps({"runs": len(specs), "computed": missing, "status": {**ended, **failed}, "failed": failed})
        )
    for label, spec in zip(sweeps.labels(specs), specs, strict=True):
        if spec.id in failed:
            click.echo(f"failed: {spec.id} {label}: {failed[spec.id]}", err=True)
    if failed:
        raise PflbenchError(f"{len(failed)} of {len(specs)} runs failed")


_runs_argument = click.argument("runs", nargs=-1)
_selection_option = click.option(
    "--selection",
    metavar="TEXT",
    default="last",
    help="which evaluations count: last, last5, or best-test  [default: last]",
)


def _load(runs: tuple[str, ...]) -> "Runs":
    """Return the records in `runs`, and say what was left out."""
    from pflbench.reports import frames

    found = frames.load(*map(Path, runs or ("runs",)))
    for path, reason in found.left_out.itertuples(index=False):
        _notice(f"left out {path}: {reason}")
    return found


@cli.command()
@_runs_argument
@click.option("--metric", metavar="TEXT", default="accuracy", help="accuracy, accuracy_mean, accuracy_worst10, "
              "accuracy_std or global_accuracy  [default: accuracy]")  # fmt: skip
@_selection_option
@click.option("--target", metavar="FLOAT", help="compare costs up to this accuracy, a fraction  [default: 90 % of the "
              "best method's]")  # fmt: skip
@click.option("--out", metavar="FOLDER", default="report", help="where it is written  [default: report]")
def report(runs: tuple[str, ...], metric: str, selection: str, target: str | None, out: str) -> None:
    """Turn records into tables, statistics and plots: report.html, and files for papers.

    RUNS are run folders, or folders of them  [default: runs].
    """
    from rich.console import Console

    from pflbench.engine.cores import cores
    from pflbench.reports import accuracy
    from pflbench.reports import report as reporting

    folder = _folder("out", out)
    assert folder is not None  # noqa: S101
    found = _load(runs)
    made = reporting.make(found, metric, selection, None if target is None else _fraction("target", target))
    files = reporting.write(made, folder, workers=cores())
    console = Console()
    if not console.is_terminal:
        console.width = 200
    for table in made.tables:
        console.print(accuracy.terminal(table))
        for note in table.notes:
            console.print(note, highlight=False, style="dim")
    console.print(f"{len(found.runs)} runs; " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)


@cli.command()
@click.argument("run_a")
@click.argument("run_b")
@_selection_option
@_json_option
def compare(run_a: str, run_b: str, selection: str, as_json: bool) -> None:
    """Show what differs between two runs: settings, versions, data, results. RUN_A and RUN_B are run folders."""
    import rich.box
    from rich.console import Console
    from rich.table import Table

    from pflbench.cli.display import percent
    from pflbench.reports.compare import compare as comparing

    found = comparing(Path(run_a), Path(run_b), selection)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    out = Table("", *found.runs, box=rich.box.SIMPLE_HEAD)
    for name, values in found.differences.items():
        out.add_row(name, *(("-" if v is None else str(v)[:24]) for v in values))
    if not found.differences:
        out.add_row("nothing differs", "", "")
    out.add_section()
    for name, pair in found.metrics.items():
        out.add_row(name, *(percent(None if value != value else value) for value in pair))  # NaN
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(out)
    click.echo(found.test)


@cli.command()
@_runs_argument
@click.option("--format", "kind", metavar="TEXT", default="csv", help="csv or parquet  [default: csv]")
@click.option("--out", metavar="FOLDER", default="export", help="where it is written  [default: export]")
def export(runs: tuple[str, ...], kind: str, out: str) -> None:
    """Write tidy tables for pandas and others: runs, rounds and clients.

    RUNS are run folders, or folders of them  [default: runs].
    """
    from pflbench.reports import frames

    folder = _folder("out", out)
    assert folder is not None  # noqa: S101
    found = _load(runs)
    for path in frames.export(found, folder, kind):
        click.echo(path)


def _suite(name: str) -> "Suite":
    from pflbench.sweep import runner as sweeps

    ready = sweeps.suites()
    path = ready.get(name, Path(name))
    if name not in ready and not path.suffix:
        raise unknown("suite", name, ready)
    return sweeps.Suite.from_toml(_toml(path, "suite"), path)


def _settings(config: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of file `config`, overridden by those `given` on the command line."""
    allowed = (*settings.fields(RunSpec), *_OWN, "set")
    values = {} if config is None else _read_config(Path(config))
    for name in values:
        if name not in allowed:
            raise unknown(f"setting in {config}", name, allowed)
    return values | {name: value for name, value in given.items() if value is not None}


def _toml(path: Path, noun: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{noun}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{noun}: {path} is not a TOML file: {str(error).splitlines()[0]}") from None


def _read_config(path: Path) -> dict[str, Any]:
    values = _underscored(_toml(path, "config"), path)
    if not isinstance(values.get("set", {}), dict):
        raise UsageError(f"config: {path}: set must be a table of hyperparameters, [set]")
    if "set" in values:
        values["set"] = _underscored(values["set"], path)
    return values


def _underscored(values: dict[str, Any], path: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key in out:
            raise UsageError(f"config: {path}: {name!r} is set twice, with a hyphen and an underscore; leave one out")
        out[key] = value
    return out


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"set: {text!r} is not NAME=VALUE")
    return name.strip().replace("-", "_"), value.strip()


def _integer(name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not an integer") from None


def _fraction(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not a number") from None
    if not 0 < number <= 1:
        raise UsageError(f"{name}: {value} is out of bounds; it must be a fraction, > 0 and <= 1")
    return number


def _folder(name: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{name}: {value!r} is not a folder")
    path = Path(value)
    try:
        taken = path.exists() and not path.is_dir()
    except OSError as error:
        raise UsageError(f"{name}: {value!r} is not a folder: {error.strerror}") from None
    if taken:
        raise UsageError(f"{name}: {path} is a file, not a folder; choose another --{name.replace('_', '-')}")
    return path


def _notice(text: str) -> None:
    click.echo(f"Note: {text}", err=True)


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.splitlines())}", err=True)
    sys.exit(code)


class _Terminated(BaseException):
    """SIGTERM, as an exception: what is open gets closed, and workers are ended."""


class _Stop:
    """The handler of SIGINT and SIGTERM: raises, but once for signals that come together.

    `timeout` sends them to the process and to its group; the second must not interrupt the end of the workers.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the last one
        self._last = -math.inf

    def __call__(self, number: int, _frame: object) -> None:
        self.number = number
        before, self._last = self._last, time.monotonic()
        if self._last - before > 5:
            raise KeyboardInterrupt if number == signal.SIGINT else _Terminated


def main() -> None:
    """Run the command line; every error that is not a fault of ours is one line, with exit code 2 for bad input."""
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, stop)
    try:
        code = cli.main(prog_name="pflbench", standalone_mode=False)
    except BaseException as error:
        # By number: compiled code that the handler's exception interrupts may raise one of its own instead.
        if stop.number == signal.SIGTERM:
            _end("terminated; a run goes on with --resume", 143)
        if stop.number == signal.SIGINT or isinstance(error, (KeyboardInterrupt, click.Abort)):
            _end("interrupted; a run goes on with --resume", 130)
        _fail(error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException) -> NoReturn:
    if isinstance(error, PflbenchError):
        _end(str(error), error.exit_code)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        sys.exit(2)
    if isinstance(error, click.ClickException):
        _end(" ".join(error.format_message().split()), 2)
    if isinstance(error, BrokenPipeError):  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    raise error
