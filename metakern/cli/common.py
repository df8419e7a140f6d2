"""Shared by all commands: settings as options and as YAML, one-line errors, the console."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from metakern.core.renamed import message, with_new_names
from metakern.core.requirements import check_installed
from metakern.core.text import quoted
from metakern.core.warn import warn_user
from metakern.runs.folder import CONFIG, newest_folder, read_config
from metakern.training.distributed import is_launched

Option = typer.Option


def group(title: str) -> Callable[..., Any]:
    """:data:`Option` for a titled group of options in the help."""
    return partial(typer.Option, rich_help_panel=title)


#: Exceptions reported as one line: invalid input, unreadable or unwritable files, missing libraries.
ERRORS = (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError)

#: Libraries that commands import late, some only after training; checked at the start.
LIBRARIES = ("matplotlib", "scipy", "sklearn", "tensorboard")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Output options of a run, which are not part of its configuration."""

    output: Annotated[
        Path | None, Option(help="Folder of the run; default: runs/LEARNER, for a second run runs/LEARNER-2.")
    ] = None
    config: Annotated[
        Path | None, Option(help="All settings of another run, its config.yaml; options given beside it override.")
    ] = None
    resume: Annotated[bool, Option("--resume", help="Continue the run in the folder, to the same bits.")] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in the folder.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print errors alone.")] = False

    @property
    def console(self) -> Console:
        """The console; silent if quiet, and in every process but the first."""
        return Console(quiet=self.quiet or not is_first_process())


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 under torchrun, which alone writes and prints."""
    return not is_launched() or os.environ["RANK"] == "0"


def fail(error: Exception) -> typer.Exit:
    """Print a one-line error; returns the exit with status 1."""
    line = " ".join(str(error).split()) or type(error).__name__
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(line)}", highlight=False)
    return typer.Exit(1)


class RunCommand(TyperCommand):
    """A command whose options take their defaults from ``--config``, or with ``--resume`` from the run's folder."""

    learner: ClassVar[str]
    settings: ClassVar[type]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take defaults from the configuration file, then parse; the command line overrides them."""
        args = with_new_options(args, getattr(self.settings, "old_names", {}))
        given: dict[str, Any] = self.make_parser(ctx).parse_args(args=list(args))[0]
        path = Path(given["config"]) if given.get("config") else None
        resumes = path is None and given.get("resume")
        if resumes:
            folder_config = Path(given.get("output") or newest_folder(self.learner)) / CONFIG
            path = folder_config if folder_config.is_file() else None
        if path is not None:
            try:
                content = checked_settings(self.settings, read_config(path, self.learner), path)
                ctx.default_map = kept(self.settings, content) if resumes else chosen(self.settings, content)
            except ERRORS as error:
                raise fail(error) from error
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            self._check_given(ctx.params, given)
        return rest

    def _check_given(self, values: Mapping[str, Any], given: Collection[str]) -> None:
        """Exit with an error for command-line options that have no effect with the other settings.

        In a configuration, which holds every setting, ineffective ones are no error.
        """
        try:
            if "resume" in given and "overwrite" in given:
                raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
            settings = self.settings(**{field.name: values[field.name] for field in dataclasses.fields(self.settings)})
            for names, reason in settings.resolved().meaningless():
                if wrong := [option(name) for name in names if name in given]:
                    verb = "have" if len(wrong) > 1 else "has"
                    raise ValueError(f"{', '.join(wrong)} {verb} no meaning {reason}")
        except ERRORS as error:
            raise fail(error) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Omit the ``--no-FLAG`` column from the help, which would be too wide for eighty columns."""
        negative = {parameter: parameter.secondary_opts for parameter in self.params}
        try:
            for parameter in negative:
                parameter.secondary_opts = []
            super().format_help(ctx, formatter)
        finally:
            for parameter, names in negative.items():
                parameter.secondary_opts = names


def with_new_options(args: list[str], names: Mapping[str, str]) -> list[str]:
    """Replace old option names in a command line by the new ones, with a warning for each."""
    found = []
    for position, argument in enumerate(args):
        given, equals, value = argument.partition("=")
        for old, new in names.items():
            if given == option(old) and "--" not in args[:position]:
                warn_user(message(option(old), option(new)), DeprecationWarning)
                given = option(new)
        found.append(given + equals + value)
    return found


def option(name: str) -> str:
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def chosen(kind: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Drop settings of a configuration that equal the default derived from the others.

    A configuration also holds derived defaults, such as evaluation steps from training steps, or the learning rate from
    the tasks. Dropped, they are derived anew from overriding options. Values other than the default stay.
    """

    def follows(name: str) -> bool:
        others = kind(**{other: value for other, value in content.items() if other != name}).resolved()
        return bool(getattr(others, name) == content[name])

    can_be_open = [field.name for field in dataclasses.fields(kind) if field.default in (None, "auto")]
    suggested = {name for name in can_be_open if name in content and follows(name)}
    return {name: value for name, value in content.items() if name not in suggested}


def kept(kind: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a resumed run; the schedule keeps the length that it began with."""
    return {"decay_iterations": content.get(kind.count), **content}


#: Types of settings, as words for error messages.
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


def checked_settings(kind: type, content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check a configuration's content against the fields of the dataclass ``kind``, and convert it.

    Raises:
        ValueError: for an unknown setting or a wrong type; names file and setting.
    """
    content = with_new_names(content, getattr(kind, "old_names", {}), f"configuration {path}: ")
    names = {field.name for field in dataclasses.fields(kind)}
    types = {name: hint for name, hint in get_type_hints(kind).items() if name in names}
    if unknown := [name for name in content if name not in types]:
        known = ", ".join(field.name for field in own_first(kind))
        listed = ", ".join(quoted(name).strip("'") for name in unknown[:9]) + (", …" if len(unknown) > 9 else "")
        raise ValueError(f"configuration {path} has unknown settings {listed}; known are {known}")
    return {name: _checked(f"configuration {path}: {name}", value, types[name]) for name, value in content.items()}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Convert ``value`` to the hint, ``kind`` or ``kind | None``; accepts handwritten forms such as 1e-3 as text."""
    kinds = get_args(hint) or (hint,)
    if type(value) in kinds:
        return value
    if kinds[0] is str and type(value) is int:  # hidden: 40
        return str(value)
    if kinds[0] is float and type(value) in (int, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be {_WORDS[kinds[0]]}, got {quoted(value)}")


def train_command(app: typer.Typer, learner: str, settings: type, function: Callable[..., None]) -> None:
    """Register ``function(settings, options)`` as ``train LEARNER``: every field of both dataclasses is an option."""

    def command(**values: Any) -> None:
        parts = [
            kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
            for kind in (settings, RunOptions)
        ]
        try:
            check_installed(*LIBRARIES)
            function(*parts)
        except typer.Exit:  # a RuntimeError, but not an error
            raise
        except ERRORS as error:
            raise fail(error) from error

    parameters = [*_parameters(settings), *_parameters(RunOptions)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = function.__doc__
    kind = type("TrainCommand", (RunCommand,), {"learner": learner, "settings": settings})
    app.command(learner, cls=kind, epilog="--no-FLAG clears a flag that a configuration sets.")(command)


#: Placeholders for values in the help.
_PLACES = {str: "TEXT", int: "N", float: "X", bool: "", Path: "PATH"}


def _parameters(settings: Any) -> list[inspect.Parameter]:
    """One keyword parameter per field of a dataclass, with its option and default."""
    hints = get_type_hints(settings, include_extras=True)
    parameters = []
    for field in own_first(settings):
        kind, info = get_args(hints[field.name])
        value = (get_args(kind) or (kind,))[0]
        info = copy.copy(info)
        info.metavar = info.metavar or _PLACES[value]
        info.show_default = value is not bool
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, info]
            )
        )
    return parameters


def own_first(settings: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, its own before inherited ones."""
    inherited = {
        field.name
        for base in settings.__bases__
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    return sorted(dataclasses.fields(settings), key=lambda field: field.name in inherited)


def choose(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is among ``choices``.

    Raises:
        ValueError: otherwise; names the setting and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {quoted(value)}")
    return value
