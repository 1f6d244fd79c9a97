"""Reading a run's configuration: YAML and dotted overrides in, frozen dataclasses out, every mistake named at once."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.check import Problem, check, value_of
from configs.errors import ConfigError
from configs.schema import Config

_SECTIONS = {item.name for item in fields(Config) if is_dataclass(item.type)}
_TYPE_NAMES = {
    NoneType: "null",
    bool: "a boolean",
    int: "an integer",
    float: "a finite number",
    str: "text",
    dict: "a mapping",
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that OmegaConf reads as a number and YAML 1.1 does not, such as 0e0."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `a.b=c` overrides applied on top of it.

    A mapping in the file (data.options, reward.functions) replaces the default one; an override of one of its keys
    merges. Raises ConfigError: one problem a line, all of them at once.
    """
    return parse(read_recipe(path), overrides, origin=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, origin: str = "config") -> Config:
    """The configuration in a YAML text; origin is what errors call it."""
    problems: list[Problem] = []
    raw = _merge(text, overrides, origin, problems)
    config: Config = _convert(raw, Config, "", problems, default=Config())
    # A key that could not be read holds its default here, about which there is nothing to say.
    unread = {problem.key for problem in problems} & set(_keys(Config, ""))
    problems += [problem for problem in check(config) if not any(key in problem.text for key in unread)]
    if problems:
        raise ConfigError("\n".join(problem.text for problem in problems))
    return config


def dump(config: Config) -> str:
    """The configuration as YAML that `load` reads back to an equal value."""
    text: str = yaml.dump(_escaped(_plain(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def changes(before: Config, after: Config) -> list[str]:
    """The keys whose values differ, as overrides that make one configuration of the other: a.b=c."""
    leaves = [key for key in _keys(Config, "") if not is_dataclass(value_of(after, key))]
    return [
        f"{key}={_show(_plain(value_of(after, key)))}"
        for key in leaves
        if value_of(before, key) != value_of(after, key)
    ]


def recipes() -> list[str]:
    """Names of the recipes that are installed with Paceline."""
    names = (entry.name for entry in files("configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_recipe(path: Path) -> Path:
    """The file a user means: a path, or the bare name of a shipped recipe. Raises ConfigError."""
    if path.is_file():
        return path
    if str(path) in recipes():
        return Path(str(files("configs") / f"{path}.yaml"))
    reason = "is a folder" if path.is_dir() else "does not exist"
    raise ConfigError(f"config file {path} {reason}; give a .yaml file or a shipped recipe: {', '.join(recipes())}")


def read_recipe(path: Path) -> str:
    """The text of the file `find_recipe` finds. Raises ConfigError."""
    try:
        return find_recipe(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _merge(text: str, overrides: Sequence[str], origin: str, problems: list[Problem]) -> Any:
    """YAML, defaults beneath it and overrides above it, as plain containers with interpolations resolved.

    Overrides that cannot be read are noted as problems and left out.
    """
    try:
        loaded = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin} is not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{origin} must hold a mapping such as 'train: {{steps: 100}}', not {_show(text)}")
    # Defaults lie beneath, so that `reward.functions.format=0.1` adds to the default functions, and a file may
    # interpolate a key it leaves alone.
    merged = OmegaConf.create(_complete(OmegaConf.to_container(loaded, resolve=False), _plain(Config())))
    for override in overrides:
        try:
            merged = OmegaConf.merge(merged, _dotted(override))
        except OmegaConfBaseException as error:
            problems.append(Problem(override, f"override {override!r}: {_one_line(error)}"))
        except ValueError as error:
            problems.append(Problem(override, str(error)))
    try:
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or origin}: {_one_line(error)}") from None


def _dotted(override: str) -> Any:
    """One `a.b=c` as an OmegaConf node. Raises ValueError."""
    key, equals, _ = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ValueError(f"override {override!r} is not of the form a.b=c, as in train.steps=20")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {override!r} has a value that is not valid YAML: {_one_line(error)}") from None


def _complete(given: Any, defaults: dict[str, Any]) -> Any:
    """Fill in the keys a mapping leaves out; a section left empty (`train:`) is all defaults."""
    if given is None:
        return defaults
    if not isinstance(given, dict):
        return given
    filled = {key: _complete(value, defaults[key]) if key in _SECTIONS else value for key, value in given.items()}
    return filled | {key: default for key, default in defaults.items() if key not in given}


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as the dicts and lists YAML knows."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _escaped(value: Any) -> Any:
    """Text holding `${` with the backslashes that keep OmegaConf from reading it as an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value


def _convert(value: Any, hint: Any, key: str, problems: list[Problem], *, default: Any) -> Any:
    """The value as its type hint wants it; where that fails, a problem is noted and the default stands in."""

    def reject(expected: str) -> Any:
        problems.append(Problem(key, f"{key}={_show(value)}: expected {expected}, not {_kind(value)}"))
        return default

    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        if not isinstance(value, dict):
            return reject("a mapping" if key in _SECTIONS else f"a mapping of {', '.join(get_type_hints(hint))}")
        return _section(value, hint, key, problems, default)
    if origin is Literal:
        if value is False and "off" in arguments:  # YAML 1.1 reads a bare off as false
            return "off"
        for allowed in arguments:
            if type(value) is type(allowed) and value == allowed:
                return value
        problems.append(Problem(key, f"{key}={_show(value)}: expected one of {', '.join(map(str, arguments))}"))
        return default
    if origin is tuple and arguments[-1] is ...:
        if not isinstance(value, list):
            return reject("a list")
        known = len(problems)
        kept = [_convert(item, arguments[0], f"{key}[{i}]", problems, default=None) for i, item in enumerate(value)]
        return tuple(kept) if len(problems) == known else default
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            return reject(f"a list of {len(arguments)}")
        return tuple(
            _convert(item, inner, f"{key}[{index}]", problems, default=default[index])
            for index, (item, inner) in enumerate(zip(value, arguments, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            return reject("a mapping")
        inner = arguments[1]
        unread: Any = inner() if isinstance(inner, type) and is_dataclass(inner) else None
        return {
            str(name): _convert(item, inner, f"{key}.{name}", problems, default=unread) for name, item in value.items()
        }
    assert hint in (bool, int, float, str), f"no conversion for {key}: {hint}"
    if hint is float and type(value) in (int, float):
        return float(value) if math.isfinite(value) else reject(_TYPE_NAMES[float])
    if hint is str and value is None and default == "":  # a shell makes a.b= of a.b=''
        return default
    if type(value) is not hint:
        return reject(_TYPE_NAMES[hint] + (" (quote it)" if hint is str and value is not None else ""))
    return value


def _section(value: Mapping[Any, Any], schema: Any, key: str, problems: list[Problem], default: Any) -> Any:
    prefix = f"{key}." if key else ""
    hints = get_type_hints(schema)
    for name in value:
        if name not in hints:
            # of one mapping among others there is no more than its own keys
            known = f"known are {', '.join(hints)}" if "." in key else _closest(f"{prefix}{name}")
            problems.append(Problem(f"{prefix}{name}", f"unknown key {prefix}{name}; {known}"))
    converted = {
        name: _convert(value[name], hint, f"{prefix}{name}", problems, default=getattr(default, name))
        for name, hint in hints.items()
        if name in value
    }
    return schema(**converted)


def _closest(unknown: str) -> str:
    """The known key a user most likely meant: a sibling spelled alike or abbreviated, the same leaf elsewhere."""
    known = list(_keys(Config, ""))
    section, _, leaf = unknown.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    initials = "".join(word[:1] for word in leaf.split("_"))  # learning_rate is lr
    candidates = [
        *(siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7)),
        *(siblings[name] for name in siblings if name == initials and len(name) > 1),
        *(key for key in known if key.rpartition(".")[2] == leaf),
        *difflib.get_close_matches(unknown, known, n=1, cutoff=0.0),
    ]
    return f"did you mean {candidates[0]}?"


def _keys(schema: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield prefix + name
        if is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return "a fraction" if math.isfinite(value) else "an infinite or undefined one"
    return _TYPE_NAMES.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)


def _show(value: Any) -> str:
    """The value on one line, short, as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'unreadable'}"
    return str(error).strip().partition("\n")[0]
