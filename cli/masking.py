"""What commands that take a mask share: the options that make one, and the table of what it freezes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import console, list_option, option_group
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from torch import nn

    from ssah_fast.masks import Mask

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--units", type=click.Path(), metavar="FILE", help="Units file, from `ssah-fast identify`."),
    list_option(
        "--freeze",
        metavar="LIST",
        help="Categories to keep bit-identical: scu,cu:6% (6 % of all units, highest I_S first).",
    ),
    list_option("--train", metavar="LIST", help="Categories to train, such as ru; everything else is frozen."),
    list_option(
        "--policy",
        metavar="NAME=VALUE,...",
        help="What belongs to no unit: embeddings, lm_head, norms, biases, qk, other = train or freeze; biases and qk "
        "also follow (their units).",
    ),
    click.option("--mask", type=click.Path(), metavar="FILE", help="A saved mask, instead of --units."),
)


# `--units --freeze --train --policy --mask`: parameters of these names, for `load_mask`
mask_options = option_group(_OPTIONS)


def load_mask(
    model: "nn.Module",
    units: str | None,
    freeze: Sequence[str],
    train: Sequence[str],
    policy: Sequence[str],
    mask: str | None,
) -> "Mask | None":
    """The mask that the options of `mask_options` ask for.

    Args:
        model: whose parameters are masked; may be on the meta device.
        units: the units file.
        freeze: categories to freeze.
        train: categories to train.
        policy: "name=value" each.
        mask: a mask file, instead of all the others.

    Returns:
        The mask, made for this model; None: no option was given.

    Raises:
        SsahError: options that contradict each other, a file that cannot be read, a mask of another model; the message
            names the option.
    """
    from ssah_fast.masks import Mask
    from ssah_fast.partition import Units

    given = {"--units": units, "--freeze": freeze, "--train": train, "--policy": policy}
    flags = [flag for flag, value in given.items() if value]
    if mask is not None:
        if flags:
            raise SsahError(f"--mask {mask} and {flags[0]} cannot be combined; give one of them")
        with _naming(f"--mask {mask}"):
            loaded = Mask.load(mask)
            loaded.check(model.named_parameters())
            return loaded
    if not flags:
        return None
    if units is None:
        raise SsahError(f"{flags[0]} needs --units FILE, from `ssah-fast identify`")
    if bool(freeze) == bool(train):
        raise SsahError(f"--units {units} needs either --freeze (such as scu,cu:6%) or --train (such as ru)")
    choices = _parse_policy(policy)
    with _naming(f"--units {units}"):
        return Units.load(units).mask(model, freeze=freeze or None, train=train or None, policy=choices)


def print_mask(mask: "Mask", model: "nn.Module", *, stderr: bool = False) -> None:
    """Print how many elements train and how many are frozen, per kind of tensor and category, and in all.

    Args:
        mask: of the model.
        model: before `ssah_fast.compact`, which adds parameters.
        stderr: print there, as progress and not as a result.
    """
    from rich.table import Table

    rows = mask.summary(model.named_parameters())
    table = Table(show_footer=True)
    trainable, frozen = (sum(row[key] for row in rows) for key in ("trainable", "frozen"))
    table.add_column("tensors", "all")
    table.add_column("category")
    table.add_column("trainable", f"{trainable:,}", justify="right")
    table.add_column("frozen", f"{frozen:,}", justify="right")
    table.add_column("% frozen", _percentage(trainable, frozen), justify="right")
    for row in rows:
        counts = row["trainable"], row["frozen"]
        category = (row["category"] or "-").upper()
        table.add_row(row["kind"], category, *(f"{count:,}" for count in counts), _percentage(*counts))
    console(stderr).print(table)


def _parse_policy(items: Sequence[str]) -> dict[str, str]:
    policy: dict[str, str] = {}
    for item in items:
        name, equals, value = (part.strip().lower() for part in item.partition("="))
        if not equals:
            raise SsahError(f"--policy {item} is not NAME=VALUE; write for example embeddings=freeze")
        if name in policy:
            raise SsahError(f"--policy {item}: {name} is given twice; give it once")
        policy[name] = value
    return policy


def _percentage(trainable: int, frozen: int) -> str:
    return f"{frozen / max(trainable + frozen, 1):.2%}"


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Put the option in front of an error of the library."""
    try:
        yield
    except SsahError as error:
        raise type(error)(f"{option}: {error}") from error
