"""`ssah-fast bench`: how fast every op is here, beside what users would run instead and beside the hardware's limit."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import Command, console, echo_json, json_option, list_option, note
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from rich.table import Table

    from ssah_fast.bench.harness import Case, Plan, Request, Row
    from ssah_fast.bench.records import Change

OPS = ("moments", "adamw", "perturb", "score", "train", "stream")
REGRESSION = 3  # exit code: a check failed

Results = Sequence[tuple["Case", Sequence["Row"]]]


@click.command(cls=Command)
@click.argument("op", type=click.Choice([*OPS, "all"]), default="all")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@list_option("--dtype", metavar="NAMES", help="Only these of bf16, fp16, fp32; score takes bf16 if nothing is said.")
@list_option(
    "--shapes",
    metavar="NAMES",
    help="cpu, tiny, llama-3-8b, qwen3-32b, llama-3-70b, or sizes like 512x4096 (as in the table's shape). "
    "[default: cpu; on a GPU, the three models]",
)
@click.option("--only", default="", metavar="TEXT", help="Only cases whose label, as shown on stderr, contains TEXT.")
@click.option("--rounds", type=click.IntRange(min=1), help="How often each runs. [default: up to 15 (GPU: 30) in 10 s]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's]")
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Measure torch.compile, too. [default: on a GPU only]"
)
@json_option
@click.option(
    "--csv", "table", type=click.Path(path_type=Path), metavar="FILE|DIR", help="Append rows; in DIR, to <op>.csv."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.html", help="Write a roofline picture.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="CSV",
    help="Compare with the newest rows of an earlier --csv; exit code 3 where one of ours became slower.",
)
def bench(
    op: str,
    device: str,
    dtype: tuple[str, ...],
    shapes: tuple[str, ...],
    only: str,
    rounds: int | None,
    threads: int | None,
    compiled: bool | None,
    as_json: bool,
    table: Path | None,
    plot: Path | None,
    compare: Path | None,
) -> int:
    """Measure OP against what users would run instead and against what the machine can do, side by side.

    Every round runs each alternative once, with the caches swept before, and beside them the machine's own rates
    (reading, copying, matrix products). Times are medians over rounds, ratios medians of the ratios within a round.
    What an op could be compared with but is not installed is named below the table. Nothing depends on the targets.
    """
    import torch

    from ssah_fast.bench import clock, harness, picture, records
    from ssah_fast.files import check_writable
    from ssah_fast.loading import torch_device

    where = torch_device(device)
    for name in dtype:
        if name not in harness.DTYPES:
            raise SsahError(f"--dtype {name} is unknown; choose from {', '.join(harness.DTYPES)}")
    for name in shapes:
        harness.sizes_of(name)
    older = [] if compare is None else records.read(compare)
    if plot is not None:
        picture.require()
        check_writable(plot)
    if table is not None:
        check_table(op, table)
    records.git_state()  # now, and kept: a commit made during the run is not what ran
    if threads is not None:
        torch.set_num_threads(threads)

    request = harness.Request(where, shapes, dtype, why_not_compiled(compiled, where.type == "cuda"))
    plans = choose(op, request, only)
    watch = clock.make_clock(where)
    machine = records.machine(where)
    results: list[tuple[Case, Sequence[Row]]] = []
    for name, cases in plans.items():
        for label, build in cases.items():
            note(label)
            watch.release()
            found = harness.measure(build(), watch, rounds)
            results += found
            if table is not None:
                records.append(
                    csv_path(table, name), [row for _, rows in found for row in rows], records.machine(where)
                )
    rows = [row for _, rows in results for row in rows]
    changes = records.compare(rows, older, machine)
    if plot is not None:
        picture.draw(rows, picture.product_rates(watch), machine["device"], plot)
        note(f"wrote {plot}")
    if as_json:
        echo_json(document(results, machine, changes if compare else None))
    else:
        show(results, machine)
        if compare is not None:
            show_changes(changes, compare)
    return REGRESSION if any(change.slower for change in changes) else 0


def check_table(op: str, table: Path) -> None:
    """Make the folder of the CSV files and look at those that are there, before anything is measured.

    Raises:
        SsahError: One of them cannot be written or has other columns.
    """
    from ssah_fast.bench import records
    from ssah_fast.files import check_writable

    for path in {csv_path(table, name) for name in (OPS if op == "all" else (op,))}:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SsahError(f"--csv {table}: the folder {path.parent} cannot be made ({error.strerror})") from error
        if check_writable(path).exists() and path.stat().st_size:
            records.check_columns(path)


def csv_path(table: Path, op: str) -> Path:
    """Return the file for an op's rows: the one given or, in a folder, <op>.csv."""
    return table if table.suffix == ".csv" and not table.is_dir() else table / f"{op}.csv"


def why_not_compiled(asked: bool | None, gpu: bool) -> str:
    """Return why torch.compile is not measured; empty: it is."""
    if asked or (asked is None and gpu):
        return ""
    return "off" if asked is not None else "off on a CPU, where compiling takes long; see --compile"


def choose(op: str, request: "Request", only: str) -> dict[str, "Plan"]:
    """Return the cases that are asked for, by op and label.

    Raises:
        SsahError: There are none.
    """
    plans: dict[str, Plan] = {}
    labels: list[str] = []
    for name in OPS if op == "all" else (op,):
        cases = importlib.import_module(f"ssah_fast.bench.{name}").plan(request)
        labels += cases
        plans[name] = {label: build for label, build in cases.items() if only in label}
    if not any(plans.values()):
        known = f"labels are {'; '.join(labels)}" if labels else "it has none of these dtypes and shapes"
        raise SsahError(f"{op}: no case matches (--only {only!r}); {known}")
    return plans


def document(results: Results, machine: dict[str, Any], changes: Sequence["Change"] | None) -> dict[str, Any]:
    """What was measured, as plain data."""
    from ssah_fast.bench import harness

    targets = [
        {**_about(case), **vars(target), "measured": outcome and outcome[0], "met": outcome and outcome[1]}
        for case, rows in results
        for target in case.targets
        for outcome in [harness.reached(rows, target)]
    ]
    absent = [{**_about(case), "absent": dict(case.absent)} for case, _ in results if case.absent]
    made = {"machine": machine, "rows": [vars(row) for _, rows in results for row in rows]}
    made |= {"targets": targets, "absent": absent}
    if changes is not None:
        made["changes"] = [
            {
                **vars(c.row),
                "old_median": c.old[0],
                "ratio": c.ratio,
                "drift": c.drift,
                "slower": c.slower,
                "git": c.git,
            }
            for c in changes
        ]
    return made


def _about(case: "Case") -> dict[str, str]:
    return {"op": case.op, "dtype": case.dtype, "shape": "x".join(map(str, case.shape)), "setting": case.setting}


def show(results: Results, machine: dict[str, Any]) -> None:
    """Print what was measured, each target beside the measured value, and what could not be measured."""
    out = console()
    title = f"{machine['device']}, {machine['threads']} threads; medians of rounds"
    out.print(_measured_table(results, title))
    targets = [(case, rows, target) for case, rows in results for target in case.targets]
    if targets:
        out.print(_target_table(targets))
    reasons = dict.fromkeys((name, reason) for case, _ in results for name, reason in case.absent.items())
    for name, reason in reasons:
        out.print(f"Not measured: {name}: {reason}", markup=False)


def _measured_table(results: Results, title: str) -> "Table":
    from rich.table import Table

    from ssah_fast.bench import harness

    table = Table(title=title)
    for column in ("op", "dtype", "shape", "setting", "alternative"):
        table.add_column(column, no_wrap=column != "setting")
    for column in ("median", "p20 - p80", "GB/s or TFLOP/s", "% of peak", "ours / it"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, rows in results:
        if rows[0].unit == harness.RATE:  # stands beside the times
            continue
        ours = rows[0]
        for row in rows:
            ratio = ours.ratios.get(row.backend) if row.backend not in harness.PEAKS else None
            table.add_row(
                *(row.op, row.dtype, row.shape, row.setting, row.backend, f"{_amount(row.median)} {row.unit}"),
                f"{_amount(row.p20)} - {_amount(row.p80)}" if row.rounds > 1 else "",
                *_rate(row, case.products),
                _number(ratio, ".3f"),
                end_section=row is rows[-1],
            )
    return table


def _rate(row: "Row", products: bool) -> tuple[str, str]:
    """The rate, and its part of the machine's: of matrix products where these dominate, else of reading memory."""
    from ssah_fast.bench import harness

    if row.unit == harness.TIME and products and row.flops:
        return f"{row.flops / row.median / 1e9:.3g} TFLOP/s", _number(row.percent_of(harness.PRODUCT), ".0f")
    return _number(row.gb_per_s, ".1f"), _number(row.percent_of_read, ".0f")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _target_table(targets: Sequence[Any]) -> "Table":
    from rich.table import Table

    from ssah_fast.bench import harness

    table = Table(title="Targets (nothing depends on them)")
    for column in ("op", "dtype", "shape", "setting", "what", "target", "measured", ""):
        table.add_column(column)
    for case, rows, target in targets:
        if target.against is None:
            what, sign, form = f"{target.name}, {rows[0].unit}", "<=", ",.0f"
        elif target.against in harness.PEAKS:
            what, sign, form = f"{target.name}, % of {target.against}", ">=", ".0f"
        else:
            what, sign, form = f"{target.name} / {target.against}", "<=", ".3f"
        outcome = harness.reached(rows, target)
        measured, verdict = "", "not measured"
        if outcome is not None:
            measured, verdict = format(outcome[0], form), "[green]met[/]" if outcome[1] else "[red]missed[/]"
        bound = f"{sign} {format(target.bound, form)}"
        table.add_row(*_about(case).values(), what, bound, measured, verdict)
    return table


def show_changes(changes: Sequence["Change"], older: Path) -> None:
    """Print how our rows compare with older ones."""
    from rich.table import Table

    out = console()
    if not changes:
        out.print(f"Nothing to compare: {older} has no row of these cases on this device with as many threads.")
        return
    table = Table(title=f"Against {older}")
    for column in ("op", "backend", "dtype", "shape", "setting", "then", "now", "now / then", "drift", "commit", ""):
        table.add_column(column, justify="right" if column in ("then", "now", "now / then", "drift") else "left")
    for change in changes:
        row = change.row
        table.add_row(
            *(row.op, row.backend, row.dtype, row.shape, row.setting),
            *(
                f"{_amount(change.old[0])} {row.unit}",
                f"{_amount(row.median)} {row.unit}",
                _number(change.ratio, ".3f"),
            ),
            *(f"{change.drift:.2f}", change.git, "[red]slower[/]" if change.slower else ""),
        )
    out.print(table)
    slower = sum(change.slower for change in changes)
    out.print(f"{slower} of {len(changes)} rows became slower by more than the spread of both runs and the drift.")
