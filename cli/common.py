"""What every command shares: option types, `--config` and `--dump-config`, and where output goes.

Imports click alone; yaml, rich and everything heavier is imported by the function that needs it, to keep `--help` fast.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from rich.console import Console

NONE_WORDS = ("none", "null")
# A table that goes to a file or a pipe has no window to fit into; rich's 80 columns would cut module names there.
PIPE_WIDTH = 160
COLUMNS = {
    "prompt_column": "Column of the prompts, where it is not recognised.",
    "response_column": "Column of the responses.",
    "text_column": "Column of plain texts.",
    "messages_column": "Column of conversations.",
}
SOURCE = ("revision", "dtype", "device", "device_map", "trust_remote_code")
_DUMP_KEY = "ssah_fast.dump_config"


def dashes(name: str) -> str:
    """Make `--safety_data` and `--safety-data` the same option (the token_normalize_func of every command)."""
    return name.replace("_", "-")


CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "token_normalize_func": dashes}


class Command(click.Command):
    """A click command with `--config FILE` (yaml or toml; flags override it) and `--dump-config`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {**CONTEXT_SETTINGS, **self.context_settings}
        self.params += [_config_option(), _dump_option()]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or print its resolved options where `--dump-config` was given."""
        if ctx.meta.get(_DUMP_KEY):
            click.echo(dump_config(ctx), nl=False)
            return None
        return super().invoke(ctx)


class Ratio(click.ParamType):
    """A fraction, written 0.013 or 1.3%."""

    name = "ratio"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the value as a fraction of one; the range is checked where the meaning is known."""
        text = str(value).strip()
        try:
            # Decimal, because 1.3 / 100 is 0.013000000000000001 in binary and would be shown and stored like that.
            return float(Decimal(text[:-1]) / 100) if text.endswith("%") else float(text)
        except (ValueError, InvalidOperation):
            self.fail(f"{value!r} is not a number or a percentage (write 0.013 or 1.3%)", param, ctx)


class OrNone(click.ParamType):
    """Another type, or the words none and null for None."""

    def __init__(self, inner: click.ParamType) -> None:
        self.inner = inner
        self.name = f"{inner.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return None for none and null (any case), else what the inner type returns."""
        if isinstance(value, str) and value.strip().lower() in NONE_WORDS:
            return None
        return self.inner.convert(value, param, ctx)


def list_option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """An option whose values may be repeated, separated by commas, or both; gives a tuple of strings."""
    return click.option(*names, multiple=True, callback=_split_commas, **attributes)


def column_options(function: Any) -> Any:
    """Options that name the columns of data files; `COLUMNS` are their parameters."""
    for name, text in reversed(COLUMNS.items()):
        function = click.option("--" + name.replace("_", "-"), help=text)(function)
    return function


def option_group(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """One decorator for several options, which `--help` lists in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# Parameters: SOURCE, the arguments of loading.load_model
source_options = option_group(
    (
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "bf16", "fp16", "fp32", "fp64"]),
            default="auto",
            show_default=True,
            help="Precision to run in; auto is the checkpoint's.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.",
        ),
        click.option("--device-map", help="Spread the model over several GPUs (accelerate), for example auto."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint."),
    )
)


def json_option(function: Any) -> Any:
    """`--json`: machine-readable output on stdout and nothing else there; the parameter is called `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of tables.")(function)


def echo_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def note(message: str) -> None:
    """Print one line of progress on stderr."""
    click.echo(message, err=True)


def process_number() -> int:
    """This process's number among those that torchrun or accelerate started; 0 where there is only one."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def console(stderr: bool = False) -> "Console":
    """A rich console on stdout (results) or stderr (progress); rich itself honours NO_COLOR and COLUMNS."""
    import rich.console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return rich.console.Console(stderr=stderr, width=None if terminal else PIPE_WIDTH, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as people read them: 12.3 s, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes else f"{seconds:.1f} s"


def read_config(path: str) -> dict[str, Any]:
    """Read a yaml or toml file of options.

    Args:
        path: the file; its ending (.yaml, .yml, .toml) says the format.

    Returns:
        The options by the names used in the file.

    Raises:
        SsahError: the file is missing, has another ending, does not parse, or is not a mapping.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".yaml", ".yml", ".toml"):
        raise SsahError(f"--config {path}: the name must end in .yaml, .yml or .toml")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise SsahError(f"--config {path}: {reason}") from error
    document = _parse_toml(path, text) if ending == ".toml" else _parse_yaml(path, text)
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise SsahError(f"--config {path}: the file must hold one mapping of option names to values")
    return document


def dump_config(ctx: click.Context) -> str:
    """The resolved options of a command as YAML that `--config` reads back."""
    import yaml

    values = {_long_name(param): _plain(ctx.params.get(param.name)) for param in _settable(ctx.command)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_apply_config,
        help="Read options from a .yaml or .toml file; flags override it.",
    )


def _dump_option() -> click.Option:
    return click.Option(
        ["--dump-config"],
        is_flag=True,
        expose_value=False,
        callback=_remember_dump,
        help="Print the resolved options as YAML and exit.",
    )


def _remember_dump(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_DUMP_KEY] = value


def _apply_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None or ctx.resilient_parsing:
        return
    known = {dashes(name): option for option in _settable(ctx.command) for name in _spellings(option)}
    defaults = {}
    for key, setting in read_config(value).items():
        if dashes(key) not in known:
            raise SsahError(f"--config {value}: unknown option {key!r}; this command has {', '.join(sorted(known))}")
        option = known[dashes(key)]
        if setting is not None or isinstance(option.type, OrNone):
            defaults[option.name] = _as_typed(option, setting)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _settable(command: click.Command) -> list[click.Parameter]:
    return [param for param in command.params if param.expose_value]


def _spellings(param: click.Parameter) -> list[str]:
    """The names of a parameter in a config file: its long flags without dashes, or its own name for an argument."""
    long_flags = [name.lstrip("-") for name in param.opts if name.startswith("--")]
    return (long_flags or [str(param.name)]) if isinstance(param, click.Option) else [str(param.name)]


def _long_name(param: click.Parameter) -> str:
    return dashes(_spellings(param)[0])


def _as_typed(param: click.Parameter, setting: Any) -> Any:
    """Bring a value of a config file into the form in which the command line would have given it."""
    several = param.multiple or param.nargs != 1
    if isinstance(setting, list | tuple):
        if not several:
            raise SsahError(f"--config: option {_long_name(param)} takes one value, not a list")
        return [_as_word(item) for item in setting]
    return [_as_word(setting)] if several else _as_word(setting)


def _as_word(setting: Any) -> Any:
    if isinstance(setting, Mapping):
        raise SsahError("--config: options are not nested; give one value or a list of values for each")
    return setting if isinstance(setting, bool) else NONE_WORDS[0] if setting is None else str(setting)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _split_commas(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    items = (item.strip() for value in values for item in value.split(","))
    return tuple(item for item in items if item)


def _parse_yaml(path: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SsahError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error


def _parse_toml(path: str, text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SsahError(f"--config {path}: not valid TOML ({error})") from error
