"""`pflbench sweep`: many experiments."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pflbench.cli import options
from pflbench.errors import PflbenchError, UsageError, at_least_one, unknown
from pflbench.sweep.suite import Suite, labels, suites

if TYPE_CHECKING:
    from pflbench.engine.execution import Execution
    from pflbench.engine.experiment import Experiment
    from pflbench.sweep.places import Here
    from pflbench.sweep.remote import Cluster


@click.command("sweep")
@click.argument("suite", required=False)
@options.spec(many=True)
@click.option(
    "--jobs", metavar="INT", help="runs at once, of one worker each  [default: one per core, or four per GPU]"
)
@click.option("--executor", metavar="TEXT", help="processes (here) or ray (a task of the cluster for each run)  "
              "[default: processes]")  # fmt: skip
@options.device
@options.ray_address
@options.out("runs", "records")
@options.data_dir
@click.option("--retry", is_flag=True, help="run failed runs again, and interrupted runs from the beginning")
@click.option("--shard", metavar="I/N", help="only part I of N parts of about equal cost, for N machines or array jobs")
@click.option("--list", "as_commands", is_flag=True, help="print a `pflbench run` command for each run to do, and stop")
@click.option("--dry-run", is_flag=True, help="print the plan, and stop")
@click.option("--quiet", is_flag=True, help="print no progress")
@options.as_json
def command(
    suite: str | None,
    jobs: str | None,
    executor: str | None,
    device: str | None,
    ray_address: str | None,
    out: str,
    data_dir: str | None,
    retry: bool,
    shard: str | None,
    as_commands: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **given: tuple[str, ...],
) -> None:
    """Run every combination of the options, which may be repeated; or SUITE, a TOML file or a ready suite.

    With SUITE, an option selects the runs of its grid that have this value. If all runs of the suite share the
    setting, the option replaces it in all of them.

    Finished runs are skipped and interrupted runs are resumed: to continue an interrupted sweep, start it again.
    """
    chosen = Suite() if suite is None else read_suite(suite)
    specs = chosen.narrowed({name: values for name, values in given.items() if values})
    if not specs:
        raise UsageError("sweep: nothing to run; give a suite, or options such as --algo fedas --algo fedavg")
    folder = options.folder("out", out)
    count = None if jobs is None else options.integer("jobs", jobs)
    if count is not None:
        at_least_one("jobs", count)
    data = options.data_folder(data_dir)

    from pflbench.sweep import runner, spread

    where = {"executor": executor, "device": device, "ray_address": ray_address}
    how = _execution(where)
    runs = runner.plan(specs, data, options.notice, download=not (dry_run or as_commands))
    if shard is not None:
        runs = spread.shard(runs, shard)
    found = {run.id: runner.status(run, folder) for run in runs}
    if retry:
        found = {run: status if status == "finished" else None for run, status in found.items()}
    if other := runner.of_other_code([run for run in runs if found[run.id] == "finished"], folder):
        name, what = next(iter(other.items()))
        options.notice(
            f"other code made {len(other)} of the recorded runs (for example {name}: {what}); "
            "to run them again, move their records away"
        )
    if as_commands:
        more = ["--resume", "--out", out, *([] if data_dir is None else ["--data-dir", data_dir])]
        for name, value in where.items():
            more += [] if value is None else [f"--{name.replace('_', '-')}", value]
        given_names = names({spec.dataset for spec in specs}, data)
        for run in runs:
            if found[run.id] is None:
                spec = dataclasses.replace(run.spec, dataset=given_names[run.spec.dataset])
                click.echo(spread.command(spec, *more))
        return
    if dry_run:
        _show_plan(runs, found, as_json=as_json)
        return
    from pflbench.cli.display import Sweeping
    from pflbench.files import check_out
    from pflbench.store import locks

    check_out(folder)
    if shard is None and None in found.values() and (system := locks.network(folder)):
        options.notice(
            f"{folder} is on a network file system ({system}), where locks may not hold; if several machines compute "
            "this sweep, give each its part with --shard"
        )
    with _place(folder, how, count, retry=retry) as place, Sweeping(runs, found, quiet=quiet or as_json) as progress:
        failed = runner.compute(runs, folder, place, retry=retry, on_event=progress.event)
    if as_json:
        ended = {run.id: runner.status(run, folder) for run in runs}
        computed = sum(status is None for status in found.values())
        click.echo(
            json.dumps({"runs": len(runs), "computed": computed, "status": {**ended, **failed}, "failed": failed})
        )
    for run, label in zip(runs, labels([run.spec for run in runs]), strict=True):
        if run.id in failed:
            click.echo(f"failed: {run.id} {label}: {failed[run.id]}", err=True)
    if failed:
        raise PflbenchError(f"{len(failed)} of {len(runs)} runs failed")


def _execution(given: dict[str, Any]) -> "Execution":
    """Return how the runs are computed. Raises `UsageError` for an executor that sweeps do not have."""
    from pflbench.engine.execution import Execution

    found = Execution(**options.execution(given))
    found.check()
    if found.executor == "serial":
        raise UsageError("executor: a sweep has processes and ray; for one run at a time, use --jobs 1")
    return found


def _place(out: Path, how: "Execution", jobs: int | None, *, retry: bool) -> "Here | Cluster":
    """Return where the runs are computed."""
    if how.executor == "ray":
        from pflbench.sweep.remote import Cluster

        return Cluster(out, how, jobs=jobs, retry=retry)
    from pflbench.sweep.places import Here

    return Here(out, jobs=jobs, retry=retry, device=how.device)


def names(datasets: set[str], data_dir: Path | None) -> dict[str, str]:
    """Return the name that the user gave each dataset, by the name that it has in a resolved spec."""
    from pflbench.datasets import default_data_dir, resolve

    folder = data_dir or default_data_dir()
    return {resolve(name, folder, notice=lambda _: None, download=False): name for name in sorted(datasets)}


def _show_plan(runs: "list[Experiment]", found: dict[str, str | None], *, as_json: bool) -> None:
    from pflbench.cli.display import counts

    if as_json:
        click.echo(json.dumps([{"id": r.id, "status": found[r.id], "spec": r.spec.to_dict()} for r in runs]))
        return
    for run, label in zip(runs, labels([run.spec for run in runs]), strict=True):
        click.echo(f"{run.id}  {found[run.id] or 'to do'}  {label}")
    click.echo(counts(found))


def read_suite(name: str) -> Suite:
    """Return the ready suite `name`, or the suite in the file `name`."""
    ready = suites()
    path = ready.get(name, Path(name))
    if name not in ready and not path.suffix:
        raise unknown("suite", name, ready)
    return Suite.from_toml(options.toml(path, "suite"), path)
