"""A sweep over machines without a common scheduler: shards of equal cost, and one command for each run."""

import re
import shlex
from collections.abc import Sequence

from pflbench import settings
from pflbench.engine.experiment import Experiment
from pflbench.errors import UsageError
from pflbench.spec import RunSpec


def shard(runs: Sequence[Experiment], part: str) -> list[Experiment]:
    """Return the runs of `part`, "I/N" with I from 1 to N, in their order. The N parts have about equal costs.

    The same runs give the same parts on every machine. Raises `UsageError` for another text.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"shard: {part!r} is not I/N, a part I from 1 to the number of parts N, such as 1/4")
    number, parts = int(found[1]) - 1, int(found[2])
    loads = [(0.0, i) for i in range(parts)]
    mine = set()
    for run in sorted(runs, key=lambda run: (-cost(run.spec), run.id)):  # the longest first, each to the least part
        load, i = min(loads)
        loads[i] = load + cost(run.spec), i
        if i == number:
            mine.add(run.id)
    return [run for run in runs if run.id in mine]


def cost(spec: RunSpec) -> float:
    """Return about how many epochs over one client's data a run takes, evaluations included."""
    training = spec.rounds * spec.joining * spec.local_epochs
    # A client's test samples, a third of its training samples, pass forward once: a ninth of the work of an epoch.
    return training + spec.clients * (spec.rounds / spec.eval_every) / 9


def command(spec: RunSpec, *more: str) -> str:
    """Return the `pflbench run` command of a run, with the arguments `more`."""
    words = ["pflbench", "run"]
    for name, field in settings.fields(RunSpec).items():
        value = getattr(spec, name)
        if value != field.default and value is not None:
            flag = name.replace("_", "-")
            words += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
    for name, value in spec.hyperparameters.items():
        words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join([*words, *more])
