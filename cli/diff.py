"""`ssah-fast diff`: how far two units files or two masks agree."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import Command, console, echo_json, json_option
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from ssah_fast.masks import Mask, Region
    from ssah_fast.partition import Units

ALL = "all"
# (layer, or None, or ALL; category or kind of tensor, or ALL) -> how many are in a, in b, in both
Counts = dict[tuple[int | str | None, str], tuple[int, int, int]]


@click.command(cls=Command)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@json_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare two units files, or two masks, of one architecture.

    Prints the Jaccard index (what both hold over what either holds) per layer: of every category for units, of the
    frozen rows and columns of every kind of tensor for masks.
    """
    from ssah_fast import files
    from ssah_fast.masks import KINDS, Mask
    from ssah_fast.partition import REPORTED, Units

    kinds = [files.read_header(path)["kind"] for path in (a, b)]
    document: dict[str, Any] = {"a": a, "b": b, "kind": kinds[0]}
    if kinds == ["units", "units"]:
        names = [category.name.lower() for category in REPORTED]
        counts, agreement = compare_units(Units.load(a), Units.load(b))
        document["agreement"] = agreement
    elif kinds == ["mask", "mask"]:
        names, counts = [*KINDS, ALL], compare_masks(Mask.load(a), Mask.load(b))
    else:
        raise SsahError(f"{a} is a {kinds[0]} file and {b} a {kinds[1]} file; give two units files or two mask files")
    document["rows"] = rows(counts, names)
    if as_json:
        echo_json(document)
        return
    _print_rows(document["rows"], names)
    if kinds[0] == "units":
        console().print(f"{agreement:.1%} of all units have the same category in both.")


def compare_units(a: "Units", b: "Units") -> tuple[Counts, float]:
    """Counts per layer and category, and the part of all units with the same category in both.

    Raises:
        SsahError: the two are of different architectures or kinds of units.
    """
    from ssah_fast.attribute_transfer import module_flows
    from ssah_fast.partition import REPORTED

    counts: Counts = {}
    for name, flow in module_flows(a, b).items():
        for i, category in enumerate(REPORTED):
            key = (a.layouts[name].layer, category.name.lower())
            _add(counts, key, int(flow[i].sum()), int(flow[:, i].sum()), int(flow[i, i]))
    total = sum(values.numel() for values in a.category.values())
    return counts, sum(both for _, _, both in counts.values()) / total


def compare_masks(a: "Mask", b: "Mask") -> Counts:
    """Frozen rows and columns per layer and kind of tensor.

    Raises:
        SsahError: the two are of different models, or the size of a parameter that is frozen as a whole is unknown.
    """
    from ssah_fast.masks import tensor_kind, tensor_layer

    cut = [{name for name, region in mask.items() if region.category is not None} for mask in (a, b)]
    odd = sorted(cut[0] ^ cut[1]) if all(cut) else []
    if odd or not set(a) & set(b):
        raise SsahError(f"masks of different models: {(odd or sorted({*a, *b}))[0]} is only in one of them")
    both, either = a & b, a | b
    counts: Counts = {}
    for name, region in either.items():
        numbers = (_frozen(name, mask.get(name), region.size) for mask in (a, b, both))
        _add(counts, (tensor_layer(name), tensor_kind(name)), *numbers)
    return counts


def rows(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per layer and name, then per name over all layers, with the Jaccard index; None for two empty sets."""
    totals: Counts = {}
    for (layer, name), numbers in counts.items():
        for key in ((layer, name), (layer, ALL), (ALL, name), (ALL, ALL)):
            _add(totals, key, *numbers)
    layers = sorted({layer for layer, _ in totals if isinstance(layer, int)})
    keys = [(layer, name) for layer in [*layers, None, ALL] for name in names]
    return [{"layer": key[0], "of": key[1], **_row(*totals[key])} for key in keys if key in totals]


def _row(a: int, b: int, both: int) -> dict[str, Any]:
    return {"a": a, "b": b, "both": both, "jaccard": both / (a + b - both) if a + b else None}


def _add(counts: Counts, key: tuple[int | str | None, str], a: int, b: int, both: int) -> None:
    old = counts.get(key, (0, 0, 0))
    counts[key] = (old[0] + a, old[1] + b, old[2] + both)


def _frozen(name: str, region: "Region | None", size: int | None) -> int:
    if region is None:
        return 0
    if region.frozen is not None:
        return region.frozen.numel()
    if size is None:
        raise SsahError(f"{name} is frozen as a whole and its size is unknown; give it: Region(axis, frozen, size)")
    return size


def _print_rows(found: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    from rich.table import Table

    shown = [name for name in names if any(row["of"] == name and row["jaccard"] is not None for row in found)]
    table = Table()
    for title in ("layer", *shown):
        table.add_column(title, justify="right")
    cells: dict[Any, dict[str, str]] = {}
    for row in found:
        value = "-" if row["jaccard"] is None else f"{row['jaccard']:.3f}"
        cells.setdefault(row["layer"], {})[row["of"]] = value
    for layer, values in cells.items():
        table.add_row("-" if layer is None else str(layer), *(values.get(name, "-") for name in shown))
    console().print(table)
    console().print("Jaccard index: what both hold / what either holds; - where neither holds anything.")
