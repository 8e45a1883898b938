"""The verbs of the command line. Each imports the module that does its work when it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidValueError, PytrackerError

if TYPE_CHECKING:
    from ..store import StoredRun


class _Group(click.Group):
    """A group whose verbs report pytracker's exceptions as one line on standard error."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PytrackerError as error:
            from ..view import visible

            raise click.ClickException(visible(str(error))) from error


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Offer the names of the runs to the shell."""
    folder = Path(context.params.get("directory") or os.environ.get("PYTRACKER_RUNS", "runs"))
    names = (path.parent.name for path in folder.glob("*/run.sqlite"))
    return sorted(name for name in names if name.startswith(incomplete) and name.isprintable())


_run = click.argument("run", required=False, default="", metavar="[RUN]", shell_complete=_complete)
_runs = click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=_complete)
_any_runs = click.argument("runs", nargs=-1, metavar="[RUN]...", shell_complete=_complete)
_directory = click.option(
    "--dir", "directory", default="runs", show_default=True, envvar="PYTRACKER_RUNS", help="The folder of the runs."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FOUND = 3  # the exit status of `diagnose --fail-on`; 1 and 2 are errors
_DAMAGED = 4  # the exit status of `check`
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=_Group, context_settings=_HELP)
@click.version_option(package_name="pytracker")
def main() -> None:
    """Look at trainings that pytracker recorded.

    RUN is the folder of a run, its name in the folder of the runs, or a part of its name that no other run there has;
    or a log of another tool: a file or folder of Hugging Face, Lightning, Keras, W&B, TensorBoard, ..., or any CSV with
    a header. LOG#2 is the third run in it.
    Where it may be left out, [RUN], it is the newest.
    """


@main.command("list")
@click.argument("folder", required=False)
@click.option("--where", multiple=True, metavar="CONDITION", help="Only such runs: lr=1e-3, val_loss<0.5, tags=paper.")
@click.option("--sort", metavar="COLUMN", help="A metric (the best first), a key of the config, steps, time, ...")
@click.option("--columns", metavar="A,B,...", help="Such as run,steps,time,val_loss,last:loss,lr.")
@click.option("--limit", type=click.IntRange(min=0), help="Show so many at most.")
@_directory
@_as_json
def list_(
    folder: str | None,
    where: tuple[str, ...],
    sort: str | None,
    columns: str | None,
    limit: int | None,
    directory: str,
    as_json: bool,
) -> None:
    """List the runs in a folder, the newest first, with their best values and what differs in their configs.

    Example: pytracker list --where lr=1e-3 --sort val_loss --limit 10
    """
    from ..store import list_runs
    from ..view import select_runs

    everything = list_runs(folder or directory)
    runs = select_runs(everything, where=where, sort=sort, limit=limit)
    if as_json:
        _print_json([_header(run) for run in runs])
    elif runs:
        from ..view import console

        chosen = [name.strip() for name in (columns or "").split(",") if name.strip()]
        console.show_runs(runs, chosen)
        if len(runs) < len(everything):
            click.echo(f"{len(runs)} of {len(everything)} runs")
    else:
        click.echo(f"no runs in {folder or directory}" if not everything else f"none of {len(everything)} runs is such")


@main.command()
@_run
@_directory
@_as_json
def show(run: str, directory: str, as_json: bool) -> None:
    """Show what is known of a run: config, series, parameters, findings.

    Example: pytracker show brisk-otter
    """
    found = _find(run, directory)
    if as_json:
        document = _header(found)
        document["parameters"] = [vars(info) for info in found.parameters]
        document["findings"] = found.findings
        _print_json(document)
    else:
        from ..view import console

        console.show(console.run_details(found))


@main.command()
@_runs
@click.option("--threshold", "thresholds", multiple=True, metavar="METRIC=VALUE", help="When was this level reached?")
@click.option("--details", is_flag=True, help="Also every metric, when levels were reached, and the surroundings.")
@_directory
@_as_json
def compare(runs: tuple[str, ...], thresholds: tuple[str, ...], details: bool, directory: str, as_json: bool) -> None:
    """Compare runs, one a row: what differs in their configs, speed, best and last values.

    Example: pytracker compare baseline wider --threshold val_loss=0.5
    """
    from ..view import compare as compare_runs

    levels = dict(map(_threshold, thresholds)) or None
    compared = compare_runs(_find_all(runs, directory), thresholds=levels)
    if as_json:
        _print_json(compared.to_dict())
    else:
        from ..view import console

        console.show(console.comparison(compared, details=details))


@main.command()
@_any_runs
@click.option("-o", "--output", default="report.html", show_default=True, type=click.Path(dir_okay=False))
@_directory
def report(runs: tuple[str, ...], output: str, directory: str) -> None:
    """Draw runs into one HTML page that opens without a network.

    Example: pytracker report baseline wider -o report.html
    """
    from ..view import write_report

    path = write_report(_find_all(runs or ("",), directory), output)
    click.echo(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


@main.command()
@click.argument("folder", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address than this one needs a token.")
@click.option("--port", default=8321, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--token", envvar="PYTRACKER_TOKEN", help="What a reader must bring; made up where it is needed.")
@_directory
def serve(folder: str | None, host: str, port: int, token: str | None, directory: str) -> None:
    """Show all runs of a folder in a browser while they grow; read only.

    Example: pytracker serve runs --port 8321
    """
    from ..view import serve as serve_runs

    def tell(address: str) -> None:
        click.echo(f"open {address} (Ctrl-C ends it)")

    serve_runs(folder or directory, host=host, port=port, token=token, ready=tell)


@main.command()
@_run
@click.option("--every", default=1.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds between reads.")
@click.option("--once", is_flag=True, help="Show it once and end.")
@_directory
def watch(run: str, every: float, once: bool, directory: str) -> None:
    """Watch a training while it runs, also one that another process writes; wait for one that has not begun.

    Where its meta or config says how many steps it is to have (total_steps, max_steps), the time left is shown.

    Example: pytracker watch brisk-otter
    """
    from ..view import visible, wait_for_run, watch_run

    def tell(message: str) -> None:
        click.echo(visible(message), err=True)

    found = _find(run, directory) if once else wait_for_run(run, directory, seconds=every, waiting=tell)
    watch_run(found.path, seconds=every, once=once)


@main.command()
@_run
@click.option("-o", "--output", default="-", show_default="standard output", type=click.Path(dir_okay=False))
@click.option(
    "--format", "format_", type=click.Choice(["csv", "json", "parquet"]), help="Default: as OUTPUT ends, or csv."
)
@click.option("--parameters", is_flag=True, help="The per-parameter intervals instead of the series.")
@click.option(
    "--guard/--no-guard",
    default=True,
    show_default=True,
    help="In CSV, put ' before names that a spreadsheet would evaluate.",
)
@_directory
def export(run: str, output: str, format_: str | None, parameters: bool, guard: bool, directory: str) -> None:
    """Write the numbers of a run as CSV, JSON or Parquet.

    Example: pytracker export brisk-otter -o curves.parquet
    """
    from ..view import export_run

    found = _find(run, directory)
    if output == "-":
        export_run(found, sys.stdout, format=format_ or "csv", parameters=parameters, guard=guard)
    else:
        export_run(found, output, format=format_, parameters=parameters, guard=guard)
        click.echo(f"{output} ({Path(output).stat().st_size:,} bytes)", err=True)


@main.command()
@_run
@click.option(
    "--fail-on",
    type=click.Choice(["info", "warning", "critical"]),
    help="Exit with status 3 where a finding is at least this severe.",
)
@click.option("--defaults", is_flag=True, help="Use all rules with their defaults, whatever the training was given.")
@_directory
@_as_json
def diagnose(run: str, fail_on: str | None, defaults: bool, directory: str, as_json: bool) -> None:
    """Say what is wrong with a training, how that is known, and what to do.

    The rules judge what is recorded, with the settings of the training. Findings that only the training could make (by
    rules that are not known here, or by comparing ranks) are shown as they were then. The status is 0, or 3 where
    --fail-on says so.

    Example: pytracker diagnose brisk-otter --fail-on warning
    """
    from ..diagnostics import SEVERITIES, diagnose_recorded, severity_rank
    from ..view import console, visible

    runs = _find_all((run,), directory)
    judged = [(each, diagnose_recorded(each.history, defaults=defaults)) for each in runs]
    if as_json:
        many = len(judged) > 1
        _print_json(
            [{**({"run": each.name} if many else {}), **found} for each, findings in judged for found in findings]
        )
    else:
        for each, findings in judged:
            if len(judged) > 1:
                click.echo(f"\n{visible(each.name)}")
            console.show(console.findings(findings))
            for line in console.not_judged(findings.unjudged):
                click.echo(visible(f"not judged: {line}"))
    worst = max((severity_rank(found) for _, findings in judged for found in findings), default=-1)
    if fail_on and worst >= SEVERITIES.index(fail_on):
        sys.exit(_FOUND)


@main.command()
@_run
@_directory
@_as_json
def check(run: str, directory: str, as_json: bool) -> None:
    """Read all of a run's file, and say what is damaged in it. The status is 0, or 4 where anything is.

    Example: pytracker check brisk-otter
    """
    from ..store import check_run, newest_run

    run = run or str(newest_run(directory))
    damage = check_run(run, directory)
    if as_json:
        _print_json(damage)
    else:
        from ..view import visible

        click.echo("\n".join(map(visible, damage)) or f"{run}: nothing is damaged")
    if damage:
        sys.exit(_DAMAGED)


@main.command()
@click.argument("run", shell_complete=_complete)
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
@click.option("--remove", is_flag=True, help="Take the tags away.")
@_directory
def tag(run: str, tags: tuple[str, ...], remove: bool, directory: str) -> None:
    """Tag a run, also while it is written; `list --where tags=TAG` finds it.

    Example: pytracker tag brisk-otter paper best
    """
    from ..view import annotate_run

    path = _find(run, directory).path
    notes = annotate_run(path, remove=tags) if remove else annotate_run(path, add=tags)
    click.echo(", ".join(notes.get("tags", ())) or "no tags")


@main.command()
@click.argument("run", shell_complete=_complete)
@click.argument("text")
@click.option("--group", is_flag=True, help="TEXT is the name of a group that the run belongs to.")
@_directory
def note(run: str, text: str, group: bool, directory: str) -> None:
    """Write a note to a run, or put it into a group; an empty TEXT takes it away.

    Example: pytracker note brisk-otter "the one in figure 3"
    """
    from ..view import annotate_run

    path = _find(run, directory).path
    if group:
        annotate_run(path, group=text)
    else:
        annotate_run(path, note=text)


@main.command()
@click.argument("run", shell_complete=_complete)
@click.argument("name")
@_directory
def rename(run: str, name: str, directory: str) -> None:
    """Give a run that nobody writes another name.

    Example: pytracker rename brisk-otter baseline
    """
    from ..view import rename_run

    click.echo(rename_run(_find(run, directory).path, name))


@main.command("rm")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=_complete)
@click.option("--yes", is_flag=True, help="Do not ask.")
@_directory
def remove(runs: tuple[str, ...], yes: bool, directory: str) -> None:
    """Delete runs that nobody writes, for good.

    Example: pytracker rm brisk-otter
    """
    from ..view import delete_run, visible

    paths = list(dict.fromkeys(_find(run, directory).path for run in runs))
    if not yes:
        names = ", ".join(visible(path.name) for path in paths)
        click.confirm(f"delete {names} for good?", abort=True, err=True)
    for path in paths:
        left = delete_run(path)
        if left:
            click.echo(f"{visible(str(path))} stays: it also holds {visible(', '.join(left[:5]))}", err=True)


@main.command()
@_as_json
def doctor(as_json: bool) -> None:
    """Say what is installed here, which back ends work, and why one does not.

    Example: pytracker doctor
    """
    from . import doctor

    sys.exit(doctor.main(as_json=as_json))


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
def demo(arguments: tuple[str, ...]) -> None:
    """Train a small network here and show what is tracked (needs torch).

    Example: pytracker demo --epochs 3
    """
    from .demo import main as train

    train.main(list(arguments), prog_name="pytracker demo", standalone_mode=False)


def _find(run: str, directory: str) -> StoredRun:
    from .runs import find_one

    found = find_one(run, directory)
    _say_what_was_taken([found])
    return found


def _find_all(runs: Iterable[str], directory: str) -> list[StoredRun]:
    from .runs import find_runs

    found = [each for run in runs for each in find_runs(run, directory)]
    _say_what_was_taken(found)
    return found


def _say_what_was_taken(runs: list[StoredRun]) -> None:
    """Say on standard error which columns of a log were taken for what."""
    from ..view import visible

    told = set()
    for log in (run.meta.get("log") for run in runs):
        if isinstance(log, dict) and log.get("path") not in told:
            told.add(log.get("path"))
            taken = ", ".join(f"{name} = {column}" for name, column in log.get("columns", {}).items())
            line = (
                f"{log.get('path')} ({log.get('format')}): {taken or 'no known name'}; a step is one {log.get('unit')}"
            )
            click.echo(visible(line), err=True)


def _threshold(text: str) -> tuple[str, float]:
    metric, found, level = text.rpartition("=")
    try:
        if not found:
            raise ValueError
        return metric, float(level)
    except ValueError:
        raise InvalidValueError(f"--threshold: expected METRIC=VALUE, such as val_loss=0.5, got {text!r}") from None


def _header(run: StoredRun) -> dict[str, Any]:
    names = ("name", "path", "state", "error", "created", "ended", "seconds", "last_step", "config", "meta", "facts")
    document = {name: getattr(run, name) for name in names}
    document["series"] = {name: vars(summary) for name, summary in run.summaries.items()}
    document["findings"] = len(run.findings)
    document["dropped"] = {"points": run.dropped_points, "blobs": run.dropped_blobs}
    return document


def _print_json(document: Any) -> None:
    from ..store import jsonable

    click.echo(json.dumps(jsonable(document), indent=2, allow_nan=False))
