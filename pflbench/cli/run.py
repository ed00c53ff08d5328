"""`pflbench run`: one experiment."""

import json
from typing import TYPE_CHECKING, Any

import click

from pflbench.cli import options
from pflbench.errors import PflbenchError, at_least_one, unknown
from pflbench.spec import RunSpec

if TYPE_CHECKING:
    from pflbench.engine.observers import Observer
    from pflbench.store.record import Record


@click.command("run")
@options.spec()
@click.option("--set", "hyperparameters", metavar="NAME=VALUE", multiple=True, help="a hyperparameter of the method; "
              "`pflbench describe ALGO` lists them; may be repeated")  # fmt: skip
@options.config
@click.option(
    "--executor", metavar="TEXT", help="processes, serial or ray; the results are the same  [default: processes]"
)
@click.option("--workers", metavar="INT", help="workers, of one thread each  [default: one per core, or four per GPU]")
@options.device
@options.ray_address
@options.out("runs", "records", in_config=True)
@options.data_dir
@click.option("--force", is_flag=True, help="run again even if there is a record")
@click.option("--resume", is_flag=True, help="continue an interrupted run from its newest good checkpoint")
@click.option("--checkpoint-every", metavar="INT", help="rounds between checkpoints  [default: 1]")
@click.option("--log", metavar="TEXT", help="tensorboard: also write the curves to OUT/tensorboard")
@click.option("--dry-run", is_flag=True, help="print the resolved settings and the run's id, and stop")
@click.option("--quiet", is_flag=True, help="print no progress and no table")
@options.as_json
def command(
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

    Without options: FedAS's published example, on CIFAR-10 if it is on disk or can be downloaded, else on synthetic
    images.
    """
    spec, execution = read(config, hyperparameters, given)
    data_dir = options.data_folder(execution.get("data_dir"))
    how = options.execution(execution)
    checkpoint_every = options.integer("checkpoint_every", execution.get("checkpoint_every", 1))
    out = options.folder("out", execution.get("out", "runs"))
    if log not in (None, "tensorboard"):
        raise unknown("log", log, ["tensorboard"])
    if dry_run:
        from pflbench.engine.execution import Execution
        from pflbench.engine.experiment import prepare

        Execution(**how).check()
        at_least_one("checkpoint_every", checkpoint_every)
        found = prepare(spec, data_dir=data_dir, notice=options.notice, download=False)
        click.echo(json.dumps({"id": found.id, "spec": found.spec.to_dict()}, indent=None if as_json else 2))
        return
    from pflbench.engine.children import signals_deferred

    with signals_deferred():  # the import of torch would lose an exception of a signal's handler
        from pflbench.engine import runner
    from pflbench.cli.display import Progress, table

    progress = Progress(quiet=quiet or as_json)
    observers: list[Observer] = [progress]
    if log is not None:
        from pflbench.cli.tensorboard import Log

        observers.append(Log(out, resume=resume))
    record = runner.run(
        spec,
        **how,
        out=out,
        force=force,
        resume=resume,
        checkpoint_every=checkpoint_every,
        data_dir=data_dir,
        notice=options.notice,
        observers=observers,
    )
    existed = not progress.started
    if as_json:
        click.echo(json.dumps({**record.to_dict(), "path": str(record.path), "existed": existed}))
    elif not quiet:
        if existed:
            click.echo(f"Run {record.id} already exists; this is its record. --force runs it again.", err=True)
        table(record)
    _fail_unless_finished(record)


def read(config: str | None, hyperparameters: tuple[str, ...], given: dict[str, Any]) -> tuple[RunSpec, dict[str, Any]]:
    """Return the run that file and command line describe, and the settings that do not change results."""
    values = options.read(config, given)
    chosen = {**values.pop("set", {}), **dict(map(options.assignment, hyperparameters))}
    execution = {name: values.pop(name) for name in options.OWN if name in values}
    return RunSpec.from_dict({**values, "hyperparameters": chosen}), execution


def _fail_unless_finished(record: "Record") -> None:
    if record.status != "finished":
        raise PflbenchError(f"run {record.id} {record.status}: {record.reason}")
