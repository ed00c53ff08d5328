"""The options that commands share, and functions that read their values and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pflbench import settings
from pflbench.errors import UsageError, unknown
from pflbench.spec import RunSpec

Command = Callable[..., None]
OWN = ("executor", "workers", "device", "ray_address", "out", "data_dir", "checkpoint_every")
"""The settings of `run` that results do not depend on."""
RUNS = Path("runs")
"""The folder of records, unless another is chosen."""

config = click.option("--config", metavar="FILE", help="TOML file of settings; the command line overrides it")
data_dir = click.option(
    "--data-dir", metavar="FOLDER", help="folder of the datasets  [default: $PFLBENCH_DATA or the user's cache folder]"
)
device = click.option(
    "--device", metavar="TEXT", help="cpu, cuda or mps: where the workers compute; not part of the id  [default: cpu]"
)
ray_address = click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="a running Ray cluster, for the executor ray  [default: Ray is started here]",
)
as_json = click.option("--json", "as_json", is_flag=True, help="print one JSON object")
runs = click.argument("runs", nargs=-1)
selection = click.option(
    "--selection",
    metavar="TEXT",
    default="last",
    help="which evaluations count: last, last5, or best-test  [default: last]",
)


def where(command: Command) -> Command:
    """Add the options `--where` and `--method`, which select runs by their settings."""
    text = "only runs with this setting, such as alpha=0.1; may be repeated: of one name, any of the values counts"
    command = click.option("--method", "methods", metavar="ALGO", multiple=True, help="only runs of this method; "
                           "may be repeated")(command)  # fmt: skip
    return click.option("--where", metavar="NAME=VALUE", multiple=True, help=text)(command)


def out(default: str, what: str, *, in_config: bool = False) -> Callable[[Command], Command]:
    """Return the option `--out`, the folder to which a command writes `what`.

    With `in_config` a configuration file may set it, so its value is None if the command line does not set it.
    """
    value = None if in_config else default
    return click.option("--out", metavar="FOLDER", default=value, help=f"folder for {what}  [default: {default}]")


def spec(names: tuple[str, ...] | None = None, *, many: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that adds an option for each setting of `RunSpec`, or for `names` only.

    With `many` each option may be repeated, and the flags of `run` take a value.
    """

    def add(command: Command) -> Command:
        known = settings.fields(RunSpec)
        for name in reversed([n for n in known if names is None or n in names]):
            kind, optional = settings.kind(RunSpec, name)
            field = known[name]
            default = "" if optional else f"  [default: {shown(field.default)}]"
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


def shown(value: Any) -> str:
    """Return a setting's value as users write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def read(file: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of configuration file `file`, overridden by the settings `given` on the command line."""
    allowed = (*settings.fields(RunSpec), *OWN, "set")
    values = {}
    if file is not None:
        path = Path(file)
        values = settings.underscored(toml(path, "config"), path)
        if not isinstance(values.get("set", {}), dict):
            raise UsageError(f"config: {path}: set must be a table of hyperparameters, [set]")
        for name in values:
            if name not in allowed:
                raise unknown(f"setting in {path}", name, allowed)
    return values | {name: value for name, value in given.items() if value is not None}


def toml(path: Path, noun: str) -> dict[str, Any]:
    """Return the contents of a TOML file. `noun` names the kind of file in the error."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{noun}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{noun}: {path} is not a TOML file: {str(error).splitlines()[0]}") from None


def assignment(text: str, option: str = "set") -> tuple[str, str]:
    """Return name and value of `NAME=VALUE`, a value of `option`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{option}: {text!r} is not NAME=VALUE")
    return name.strip().replace("-", "_"), value.strip()


def integer(name: str, value: Any) -> int:
    """Return `value`, the value of option `name`, as an integer."""
    try:
        return int(str(value))
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not an integer") from None


def execution(given: dict[str, Any]) -> dict[str, Any]:
    """Return how a run is computed, as `Execution` takes it, from the settings `given`: text, or values from TOML."""
    found = {name: str(given[name]) for name in ("executor", "device", "ray_address") if given.get(name) is not None}
    return found if given.get("workers") is None else {**found, "workers": integer("workers", given["workers"])}


def fraction(name: str, value: str) -> float:
    """Return `value`, the value of option `name`, as a number above 0 and up to 1."""
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not a number") from None
    if not 0 < number <= 1:
        raise UsageError(f"{name}: {value} is out of bounds; it must be a fraction, > 0 and <= 1")
    return number


def folder(name: str, value: Any) -> Path:
    """Return `value`, the value of option `name`, as the path of a folder, which need not exist."""
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


def records(runs: tuple[str, ...]) -> list[Path]:
    """Return the paths of `runs`, paths or ids of runs in the folder `runs`; this folder if there are none."""
    from pflbench.store import listing

    return [listing.find(run, RUNS) for run in runs] or [RUNS]


def data_folder(value: Any) -> Path | None:
    """Return the value of `--data-dir`, None for the default folder."""
    return None if value is None else folder("data_dir", value)


def notice(text: str) -> None:
    """Show the user a remark."""
    click.echo(f"Note: {text}", err=True)
