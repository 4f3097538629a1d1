"""From a section of the configuration to an object, with one clear line for whatever is wrong.

Every constructor is keyword-only and typed, so its signature is the schema of its section: unknown
keys, missing values and wrong types are found before the call, and named with their full path.
"""

import functools
import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.errors import ConfigError


def construct(section: Mapping[str, Any], path: str, **given: Any) -> Any:
    """Calls `section["_target_"]` with the other keys of the section and `given`.

    With `_partial_: true` the call is left to whoever completes the arguments. `path` is the place
    of the section, as the user writes it. Raises ConfigError.
    """
    _check_section(section, path)
    keywords = {key: value for key, value in section.items() if not _reserved(key)}
    if "_target_" not in section:
        raise ConfigError(f"{path}._target_: missing; allowed: the name of a class or function")
    target = locate(section["_target_"], f"{path}._target_")
    partial = bool(section.get("_partial_"))
    return call(target, keywords, path, partial=partial, **given)


def call(
    target: Callable[..., Any],
    section: Mapping[str, Any],
    path: str,
    *,
    partial: bool = False,
    **given: Any,
) -> Any:
    """`target(**section, **given)`; what is wrong with it becomes a ConfigError under `path`."""
    _check_section(section, path)
    _check(target, section, path, given, partial)
    parameters = inspect.signature(target).parameters

    @functools.wraps(target, updated=())
    def guarded(*args: Any, **rest: Any) -> Any:
        try:
            return target(*args, **{**section, **given, **rest})
        except ValueError as error:
            line = str(error)
            # Constructors name their keyword first: the user's key is below the section's path.
            joint = "." if line.partition(" ")[0] in parameters else ": "
            raise ConfigError(line if line.startswith(path) else f"{path}{joint}{line}") from error

    return guarded if partial else guarded()


def _reserved(key: str) -> bool:
    return key.startswith("_") and key.endswith("_")


def _check_section(section: object, path: str) -> None:
    """`model.moe=false` and the like replace a whole section."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}={section}: allowed: a section, whose keys are {path}.*")


def locate(name: str, path: str) -> Callable[..., Any]:
    """The class or function of that name; raises ConfigError under `path`."""
    module, _, attribute = str(name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot import {name!r} ({error})") from error


def _check(
    target: Callable[..., Any],
    section: Mapping[str, Any],
    path: str,
    given: Iterable[str],
    partial: bool,
) -> None:
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    prefix = f"{path}." if path else ""
    free = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in given]
    for key, value in section.items():
        if key not in free:
            allowed = ", ".join(sorted(free)) or "none"
            raise ConfigError(f"{prefix}{key}={value}: unknown key; allowed: {allowed}")
        if key in hints and not _accepts(hints[key], value):
            raise ConfigError(f"{prefix}{key}={value}: allowed: {_describe(hints[key])}")
    if partial:
        return
    for key in free:
        if key not in section and parameters[key].default is inspect.Parameter.empty:
            allowed = _describe(hints.get(key, Any))
            raise ConfigError(f"{prefix}{key}: missing; allowed: {allowed}")


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value read from YAML may stand for `hint`; hints it knows nothing of accept all."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if hint is float:
        return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
    if hint is int:
        return _is_int(value)
    if origin is tuple and args[-1] is not ...:
        return (
            isinstance(value, Sequence)
            and len(value) == len(args)
            and all(map(_accepts, args, value))
        )
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(_accepts(args[0], item) for item in value)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    return True


def _is_int(value: Any) -> bool:
    """An integer that a tensor can hold, too."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return ", ".join(map(str, args))
    if hint is types.NoneType:
        return "null"
    if hint is float:
        return "finite float"
    if origin is not None:
        inner = ", ".join(_describe(arg) for arg in args if arg is not ...)
        return f"{getattr(origin, '__name__', origin).lower()} of {inner}"
    return getattr(hint, "__name__", str(hint))
