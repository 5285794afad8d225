"""Where the settings come from, and which source wins.

From the strongest: an option of the command, `--set`, the environment (`MMM4REC_FINETUNE__LR=…`), `mmm4rec.toml`,
the domain's preset, the model's preset, the protocol's preset, the default. Every source is read into a flat list of
`Given` values, each with the name of its source, so that everything that is wrong in any of them is refused at once, by
name.
"""

import difflib
import functools
import os
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from mmm4rec_cli.errors import RunError, UsageError
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.presets import DOMAINS, MODELS, Nested, merged
from mmm4rec_cli.settings.schema import Section, Settings
from mmm4rec_cli.workspace import Workspace

Source = Literal["option", "set", "environment", "file", "preset"]
PREFIX = "MMM4REC_"
NOT_SETTINGS = frozenset({"MMM4REC_WORKSPACE", "MMM4REC_TEST_DATA"})
"""Variables with our prefix that are no settings."""

_HINT = "correct or remove what is named; an option wins over --set, then the environment, the file, the preset"


class _Sources(Settings, BaseSettings):
    """The settings as pydantic-settings reads them from the environment and from TOML."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", enable_decoding=False)


@dataclass(frozen=True)
class Given:
    """One value that a source gives.

    Attributes:
        path: the setting, dotted: "finetune.lr".
        value: as the source spells it; in `Resolved.given` as the settings hold it.
        source: the kind of source.
        label: the source as the user knows it: "--lr", "--set finetune.lr", "MMM4REC_FINETUNE__LR", "mmm4rec.toml".
    """

    path: str
    value: Any
    source: Source
    label: str


@dataclass(frozen=True)
class Resolved:
    """Settings, and for every value that a source gave, the source that won.

    Attributes:
        settings: the settings.
        given: setting (dotted) -> the winning `Given`; settings at their default are absent.
    """

    settings: Settings
    given: Mapping[str, Given]

    def is_set(self, path: str) -> bool:
        """Whether the user set `path` in any source; presets and defaults do not count."""
        return path in self.given and self.given[path].source != "preset"


def load(
    file: Path | str | None = None,
    overrides: Iterable[str] = (),
    *,
    domain: str | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    workspace: Workspace | None = None,
) -> Settings:
    """The settings of one invocation.

    Args:
        file: a TOML file with the settings; None: `mmm4rec.toml` in the workspace, if it is there.
        overrides: "section.key=value" as for `--set`; the value is a TOML literal, else a string.
        domain: the domain (or mix) whose preset is laid under everything the user gives.
        model: the baseline whose preset is laid under the domain's.
        options: setting (dotted) -> value of a command's own option; None counts as not given.
        workspace: where `mmm4rec.toml` is looked for; None: `MMM4REC_WORKSPACE`, else the current folder.

    Raises:
        UsageError: all unknown settings and bad values of all sources together; a file that is missing or no TOML.
    """
    return resolve(file, overrides, domain=domain, model=model, options=options, workspace=workspace).settings


def resolve(
    file: Path | str | None = None,
    overrides: Iterable[str] = (),
    *,
    domain: str | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    workspace: Workspace | None = None,
) -> Resolved:
    """`load`, which also says where each value came from. Arguments and errors as there."""
    workspace = workspace or Workspace(Path(os.environ.get("MMM4REC_WORKSPACE") or "."))
    problems: list[str] = []
    weakest_first: list[Given] = []
    if model is not None:
        weakest_first += _leaves(MODELS.get(model, {}), "preset", f"preset of {model}")
    if domain is not None:
        weakest_first += _leaves(DOMAINS.get(domain, {}), "preset", f"preset of {domain}")
    weakest_first += _from_file(file, workspace)
    weakest_first += _from_environment(problems)
    weakest_first += _from_overrides(overrides, problems)
    for path, value in (options or {}).items():
        if value is not None:
            weakest_first.append(Given(path, value, "option", _option_name(path)))

    given: dict[str, Given] = {}
    faulty: set[str] = set()
    for one in weakest_first:
        problem, value = _checked(one)
        if problem is None:
            given[one.path] = Given(one.path, value, one.source, one.label)
        else:
            problems.append(problem)
            faulty.add(one.path.partition(".")[0])
    try:
        settings = Settings.model_validate(_nested({path: one.value for path, one in given.items()}))
    except ValidationError as error:
        # A rule between settings is only worth a line where each of them alone is right.
        problems += [
            f"{where} ({_origins(given, where)}): {_reason(detail)}"
            for detail in error.errors()
            if (where := ".".join(map(str, detail["loc"]))).partition(".")[0] not in faulty
        ]
    if problems:
        raise UsageError(*problems, hint=_HINT)
    return Resolved(settings, given)


def for_run(
    run_settings: Mapping[str, Any],
    invocation: Resolved,
    *,
    run: str = "the run",
    free: Sequence[str] = ("evaluate", "runtime"),
    reporter: Reporter | None = None,
) -> Settings:
    """The settings for work on an existing run: the run's own, but for what belongs to the invocation.

    Args:
        run_settings: the document in the run's settings.json.
        invocation: what the user gave now.
        run: the run's name, for messages.
        free: settings or sections (dotted) that the invocation decides, given or not.
        reporter: takes one note on variables and file entries that differ from the run and are not used.

    Raises:
        UsageError: an option or `--set` contradicts the run; both values are named.
        RunError: the run's settings do not fit this version's schema.
    """
    try:
        saved = Settings.model_validate(dict(run_settings)).model_dump()
    except ValidationError as error:
        raise RunError(
            *(f"settings.json of {run}: {'.'.join(map(str, e['loc']))}: {_reason(e)}" for e in error.errors()),
            hint="the run was written by another version of mmm4rec, or the file was edited",
        ) from None
    now = invocation.settings.model_dump()
    contradictions: list[str] = []
    unused: list[str] = []
    for path, one in sorted(invocation.given.items()):
        if one.source == "preset" or any(path == f or path.startswith(f + ".") for f in free):
            continue
        held, wanted = _at(saved, path), _at(now, path)
        if held == wanted:
            continue
        if one.source in ("option", "set"):
            contradictions.append(f"{path} ({one.label}): {_shown(wanted)}, but {run} has {_shown(held)}")
        else:
            unused.append(f"{path} = {_shown(held)} (not {_shown(wanted)} from {one.label})")
    if contradictions:
        raise UsageError(
            *contradictions, hint="leave the option out to use the run's value, or train a run with the other value"
        )
    if unused:
        (reporter or SilentReporter()).note(f"{run} holds: {', '.join(unused)}")
    for path in free:
        saved = merged(saved, _nested({path: _at(now, path)}))
    return Settings.model_validate(saved)


def _from_file(file: Path | str | None, workspace: Workspace) -> list[Given]:
    path = workspace.config if file is None else Path(file)
    if not path.is_file():
        if file is None:
            return []
        raise UsageError(f"--config {path}: no such file", hint="give the path of a TOML file, or leave --config out")
    label = path.name if file is None else str(path)
    try:
        return _leaves(TomlConfigSettingsSource(_Sources, toml_file=path).toml_data, "file", label)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{label}: not valid TOML: {error}",
            hint="a setting is written as: lr = 0.0001 below a line [finetune]; texts in quotes",
        ) from None


def _from_environment(problems: list[str]) -> list[Given]:
    ours = {name for name in os.environ if name.upper().startswith(PREFIX)} - NOT_SETTINGS
    spelled = {name.upper(): name for name in ours}
    variables = [_variable(path) for path in _known()]
    found = _leaves(EnvSettingsSource(_Sources)(), "environment", "")
    given = []
    for one in found:
        name = _variable(one.path)
        given.append(Given(one.path, one.value, "environment", spelled.get(name, name)))
    seen = {_variable(one.path) for one in found}
    for upper, name in sorted(spelled.items()):
        if upper not in seen and upper not in variables:
            close = difflib.get_close_matches(upper, variables, n=1, cutoff=0.75)
            problems.append(f"{name} (environment): unknown{f'; did you mean {close[0]}?' if close else ''}")
    return given


def _from_overrides(overrides: Iterable[str], problems: list[str]) -> list[Given]:
    given: list[Given] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path:
            problems.append(f"--set {override}: not of the form section.key=value")
            continue
        given += _leaves(_literal(path, text.strip()), "set", f"--set {path}", path)
    return given


def _literal(path: str, text: str) -> Any:
    """`text` as a TOML literal, else as a string; as it stands where the setting is a text anyway."""
    field = _known().get(path)
    if field is not None and not text.startswith(('"', "'")) and _takes_text(field.annotation):
        return text
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return document["value"] if len(document) == 1 else text


def _takes_text(annotation: Any) -> bool:
    return annotation is str or (
        get_origin(annotation) in (Union, types.UnionType) and set(get_args(annotation)) == {str, type(None)}
    )


def _leaves(value: Any, source: Source, label: str, path: str = "") -> list[Given]:
    """The values in a nested document, each under its dotted path; an empty table of a known section gives nothing."""
    if isinstance(value, Mapping) and (value or not path or path in _sections()):
        prefix = f"{path}." if path else ""
        return [one for key, below in value.items() for one in _leaves(below, source, label, f"{prefix}{key}")]
    return [Given(path, value, source, label)]


def _checked(one: Given) -> tuple[str | None, Any]:
    """What is wrong with one value (None: nothing), and the value as the settings hold it."""
    where = f"{one.path} ({one.label})"
    field = _known().get(one.path)
    if field is None:
        if one.path in _sections():
            return f"{where}: a section, not a setting; its settings are {one.path}.{_inside(one.path)}", None
        name = one.path.rpartition(".")[2]
        close = [path for path in _known() if path.rpartition(".")[2] == name] or difflib.get_close_matches(
            one.path, [*_known(), *_sections()], n=1, cutoff=0.7
        )
        advice = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(Settings.model_fields)}"
        return f"{where}: unknown; {advice}", None
    try:
        return None, _adapter(one.path).validate_python(one.value)
    except ValidationError:
        return f"{where}: {_shown(one.value)} is not allowed; allowed: {allowed(one.path)}", None


@functools.cache
def _known() -> dict[str, FieldInfo]:
    """Every setting by its dotted path."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return dict(walk(Settings, ""))


def _sections() -> set[str]:
    return {path.rpartition(".")[0] for path in _known()} - {""}


def _inside(section: str) -> str:
    names = [path.removeprefix(f"{section}.") for path in _known() if path.startswith(f"{section}.")]
    return f"{{{', '.join(names)}}}"


@functools.cache
def _adapter(path: str) -> TypeAdapter[Any]:
    field = _known()[path]
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def allowed(path: str) -> str:
    """The values that the setting at `path` takes, in words: "a number above 0"."""
    field = _known()[path]
    return _described(field.annotation, field.metadata)


def _described(annotation: Any, metadata: Iterable[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one, metadata) for one in get_args(annotation) if one is not type(None))
    if origin is Annotated:
        inner, *outer = get_args(annotation)
        return _described(inner, [*_constraints(outer), *_constraints(metadata)])
    if origin is tuple:
        return f"a comma-separated list, each {_described(get_args(annotation)[0], ())}"
    if annotation is bool:
        return "true or false"
    parts = []
    for constraint in _constraints(metadata):
        for attribute, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            bound = getattr(constraint, attribute, None)
            if bound is not None:
                parts.append(f"{words} {bound}")
        pattern = getattr(constraint, "pattern", None)
        if pattern is not None:
            parts.append(f"of the form {pattern}")
        if getattr(constraint, "min_length", None):
            parts.append("not empty")
    kind = {int: "a whole number", float: "a number"}.get(annotation, "a text")
    return f"{kind} {' and '.join(parts)}".strip()


def _constraints(metadata: Iterable[Any]) -> Iterator[Any]:
    for one in metadata:
        yield from _constraints(one.metadata) if isinstance(one, FieldInfo) else (one,)


def _variable(path: str) -> str:
    return PREFIX + path.replace(".", "__").upper()


def _option_name(path: str) -> str:
    return "--" + path.rpartition(".")[2].replace("_", "-")


def _nested(flat: Mapping[str, Any]) -> Nested:
    result: Nested = {}
    for path, value in flat.items():
        document = value
        for key in reversed(path.split(".")):
            document = {key: document}
        result = merged(result, document)
    return result


def _at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[key]
    return document


def _origins(given: Mapping[str, Given], section: str) -> str:
    labels = {one.label: None for path, one in given.items() if path == section or path.startswith(f"{section}.")}
    return ", ".join(labels) or "defaults"


def _reason(detail: Any) -> str:
    return str(detail["msg"]).removeprefix("Value error, ")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, str) else str(value)
