"""A recipe: steps of one experiment as command lines, read from YAML and checked as a whole before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from ssah_fast.errors import SsahError

PROGRAM = "ssah-fast"
FOLDER = "${folder}"  # the run folder; kept in records as it stands, so that a folder can be moved
RECORDS, SUMMARY = ".steps", "run.json"  # what a run keeps in its folder for itself
MUST_BE_SET = "???"
_RECIPE_KEYS = ("base", "title", "variables", "launcher", "published", "steps")
_STEP_KEYS = ("command", "title", "arguments", "options", "launcher", "allow")
_NAME = re.compile(r"[A-Za-z]\w*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_WRITTEN = ("output", "figures", "use_cache")  # parameters whose paths a command writes
# A value that ends or begins like this names a file or a folder, and one that is missing is a mistake, not a hub id.
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".safetensors", ".yaml", ".yml", ".toml")
_PATH_STARTS = ("/", "./", "../", "~", FOLDER)


@dataclass(frozen=True)
class Step:
    """One public command line.

    Attributes:
        name: Its name in the recipe.
        title: The same for people, or None.
        command: The command's name.
        words: The command line after the program's name; `FOLDER` stands for the run folder.
        launcher: The words in front of the program's name, such as torchrun's; empty: the command runs in this process.
        output: What it writes, relative to the run folder; None: it only prints.
        inputs: The local files and folders that it reads, with `FOLDER` as in `words`.
        needs: The names of the steps that make some of them.
        resumable: The command has `--resume-from-checkpoint`, and the recipe does not use it.
        allow: Exit codes other than 0 that do not end the run.
    """

    name: str
    title: str | None
    command: str
    words: tuple[str, ...]
    launcher: tuple[str, ...]
    output: str | None
    inputs: tuple[str, ...]
    needs: tuple[str, ...]
    resumable: bool
    allow: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe whose references are resolved and whose command lines the commands accept.

    Attributes:
        path: The file, as given.
        title: What it is about, or None.
        published: Figures of a paper, for the report: name -> {"source", "note", "rows"}; or None.
        steps: In the order in which they run.
    """

    path: str
    title: str | None
    published: dict[str, Any] | None
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step of a name."""
        return next(step for step in self.steps if step.name == name)


def load_recipe(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    commands: click.Group,
    settings: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a recipe and check all of it: names, references, every option of every command, input files.

    Args:
        path: The YAML file.
        folder: The run folder; it need not exist.
        commands: The group that has the commands.
        settings: Values of variables, in place of the recipe's own; "null" and "[a, b]" are read as YAML.

    Returns:
        The recipe.

    Raises:
        SsahError: Something is wrong; the message names the file, the step and the entry.
    """
    document = _document(os.fspath(path))
    try:
        return _Reader(path, folder, commands).read(document, settings or {})
    except SsahError as error:
        raise type(error)(f"{path}: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word, so that a step would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Reader:
    """Reads one recipe; `values` holds what a reference may name at the step that is being read."""

    def __init__(self, path: str | os.PathLike[str], folder: str | os.PathLike[str], commands: click.Group) -> None:
        self.path, self.folder, self.commands = os.fspath(path), os.fspath(folder), commands
        self.values: dict[str, Any] = {"folder": FOLDER}
        self.outputs: dict[str, str] = {}  # step -> its output
        self.later: set[str] = set()

    def read(self, document: Mapping[str, Any], settings: Mapping[str, str]) -> Recipe:
        self._set_variables(_mapping(document.get("variables"), "variables"), settings)
        steps = _mapping(document.get("steps"), "steps")
        if not steps:
            raise SsahError("it has no steps; name them below `steps:`")
        self._check_names(steps)
        self.later = set(steps)
        launcher = document.get("launcher")
        made = tuple(self._step(name, _mapping(entry, f"step {name}"), launcher) for name, entry in steps.items())
        published = document.get("published")
        return Recipe(
            self.path, document.get("title"), None if published is None else _mapping(published, "published"), made
        )

    def _set_variables(self, variables: Mapping[str, Any], settings: Mapping[str, str]) -> None:
        unknown = next((name for name in settings if name not in variables), None)
        if unknown is not None:
            raise SsahError(f"--set {unknown}: no such variable; there are {', '.join(variables) or 'none'}")
        given = {**variables, **{name: _setting(name, text) for name, text in settings.items()}}
        missing = [name for name, value in given.items() if value == MUST_BE_SET]
        if missing:
            raise SsahError(f"give {', '.join(f'--set {name}=...' for name in missing)}")
        for name, value in given.items():
            self._check_name(name, "variable")
            self.values[name] = self._expand(value, f"variable {name}")

    def _check_names(self, steps: Mapping[str, Any]) -> None:
        for name in steps:
            self._check_name(name, "step")

    def _check_name(self, name: Any, kind: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SsahError(f"{kind} {name!r}: a name is a letter and then letters, digits and underscores")
        if name in self.values:
            raise SsahError(f"{kind} {name}: the name is taken; choose another")

    def _step(self, name: str, entry: Mapping[str, Any], launcher: Any) -> Step:
        where = f"step {name}"
        _refuse_others(entry, _STEP_KEYS, where)
        command = self._command(entry.get("command"), where)
        options = self._options(_mapping(entry.get("options"), f"options of {where}"), where)
        output = self._output(options.get("output"), where)
        if output is not None:
            options["output"] = f"{FOLDER}/{output}"
        words = (str(command.name), *self._words(entry.get("arguments"), options, where))
        inputs = tuple(dict.fromkeys(self._inputs(command, words, where)))
        needs = tuple(step for step, made in self.outputs.items() if any(self._makes(made, path) for path in inputs))
        resumable = _has(command, "resume_from_checkpoint") and "resume-from-checkpoint" not in options
        self.later.discard(name)
        if output is not None:
            self.outputs[name] = output
            self.values[name] = f"{FOLDER}/{output}"
        return Step(
            name=name,
            title=self._expand(entry.get("title"), where),
            command=str(command.name),
            words=words,
            launcher=_strings(self._expand(entry.get("launcher", launcher), where), f"launcher of {where}"),
            output=output,
            inputs=inputs,
            needs=needs,
            resumable=resumable,
            allow=_codes(entry.get("allow"), where),
        )

    def _command(self, name: Any, where: str) -> click.Command:
        context = click.Context(self.commands)
        command = self.commands.get_command(context, str(name)) if name else None
        if command is None:
            known = ", ".join(self.commands.list_commands(context))
            raise SsahError(f"{where}: there is no command {name!r}; the commands are {known}")
        return command

    def _options(self, options: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {str(name).replace("_", "-"): self._expand(value, where) for name, value in options.items()}

    def _output(self, output: Any, where: str) -> str | None:
        """The output as a plain relative path that belongs to this step alone."""
        if output is None:
            return None
        path = os.path.normpath(str(output))
        if os.path.isabs(path) or path.startswith(("..", "$", "~")) or path.split(os.sep)[0] in (".", RECORDS, SUMMARY):
            raise SsahError(f"{where}: output {output} must be a path of its own inside the run folder")
        for other, made in self.outputs.items():
            if _within(path, made) or _within(made, path):
                raise SsahError(f"{where}: output {output} and that of step {other}, {made}, lie in each other")
        return path

    def _words(self, arguments: Any, options: Mapping[str, Any], where: str) -> Iterator[str]:
        if arguments is not None and not isinstance(arguments, list):
            raise SsahError(f"{where}: arguments is a list")
        yield from _strings(self._expand(arguments, where), f"arguments of {where}")
        for name, value in options.items():
            if value is None or value == []:
                continue
            if isinstance(value, bool):
                yield f"--{name}" if value else f"--no-{name}"
            else:
                yield f"--{name}"
                yield ",".join(_strings(value if isinstance(value, list) else [value], f"option {name} of {where}"))

    def _inputs(self, command: click.Command, words: tuple[str, ...], where: str) -> Iterator[str]:
        """Parse the command line as the command will, and find in it what it reads."""
        try:
            parsed = command.make_context(str(command.name), list(words[1:]))
        except click.ClickException as error:
            raise SsahError(f"{where}: {' '.join(error.format_message().split())}") from error
        for parameter in command.params:
            if parameter.name in _WRITTEN or not isinstance(parameter.type, click.Path | click.types.StringParamType):
                continue
            for value in _flat(parsed.params.get(str(parameter.name))):
                yield from self._paths(value, where)

    def _paths(self, value: str, where: str) -> Iterator[str]:
        """The existing or expected paths in one value: as a whole, else in its parts between commas."""
        parts = [value] if self._is_there(value) else value.split(",")
        for part in map(str.strip, parts):
            # NAME=MODEL, guard:MODEL and FOLDER:config:split hold a path beside something else.
            forms = (part, part.partition("=")[2], part.partition(":")[2], part.partition(":")[0])
            found = next((form for form in forms if form and self._is_there(form)), None)
            if found is not None:
                yield found
            elif part.lower().endswith(_FILE_ENDINGS) or part.startswith(_PATH_STARTS):
                raise SsahError(
                    f"{where}: {part.replace(FOLDER, self.folder)} does not exist, and no step before makes it"
                )

    def _is_there(self, path: str) -> bool:
        return (
            os.path.exists(place(path, self.folder))
            or any(self._makes(made, path) for made in self.outputs.values())
            or path == FOLDER
        )

    def _makes(self, output: str, path: str) -> bool:
        """Whether an output is, holds or lies in a path."""
        made = f"{FOLDER}/{output}"
        return _within(os.path.normpath(path), made) or _within(made, os.path.normpath(path))

    def _expand(self, value: Any, where: str) -> Any:
        """Replace references; one that is the whole value keeps its type."""
        if isinstance(value, list):
            return [self._expand(item, where) for item in value]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return self._value(whole[1], where)
        return _REFERENCE.sub(lambda match: _word(self._value(match[1], where), f"{match[0]} in {where}"), value)

    def _value(self, name: str, where: str) -> Any:
        if name in self.values:
            return self.values[name]
        reason = "comes later" if name in self.later else "is neither a variable nor the output of a step"
        raise SsahError(f"{where}: ${{{name}}} {reason}")


def place(path: str, folder: str | os.PathLike[str]) -> Path:
    """A path or word of a recipe, with the run folder in its place."""
    return Path(path.replace(FOLDER, os.fspath(folder))).expanduser()


def _document(path: str) -> dict[str, Any]:
    """What a file holds; where it names a base, its entries, variables and steps replace those of the base."""
    own = _entries(path, _RECIPE_KEYS)
    name = own.pop("base", None)
    if name is None:
        return own
    base = _entries(os.path.join(os.path.dirname(path), str(name)), _RECIPE_KEYS[1:])
    merged = ("variables", "steps")
    both = {key: {**_mapping(base.get(key), key), **_mapping(own.get(key), f"{path}: {key}")} for key in merged}
    return {**base, **own, **both}


def _entries(path: str, known: Iterable[str]) -> dict[str, Any]:
    entries = _mapping(_parse(path), path)
    _refuse_others(entries, known, path)
    return entries


def _parse(path: str) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise SsahError(f"cannot read {path}: {reason}") from error
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise SsahError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from error


def _setting(name: str, text: str) -> Any:
    if text != "null" and not text.startswith("["):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SsahError(f"--set {name}={text}: not a YAML list") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SsahError(f"{where}: a mapping (name: value) is needed here")
    return value


def _refuse_others(entry: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    other = next((key for key in entry if key not in known), None)
    if other is not None:
        raise SsahError(f"{where}: unknown entry {other!r}; there are {', '.join(known)}")


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise SsahError(f"{where}: a list is needed, not {value!r}")
    return tuple(_word(item, where) for item in value)


def _word(value: Any, where: str) -> str:
    if value is None or isinstance(value, bool | list | dict):
        raise SsahError(f"{where}: {value!r} is not one word; write it in quotes")
    return str(value)


def _codes(value: Any, where: str) -> tuple[int, ...]:
    codes = [] if value is None else value
    if not isinstance(codes, list) or not all(isinstance(code, int) for code in codes):
        raise SsahError(f"{where}: allow is a list of exit codes, such as [3]")
    return tuple(codes)


def _has(command: click.Command, name: str) -> bool:
    return any(parameter.name == name for parameter in command.params)


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(other + os.sep)
