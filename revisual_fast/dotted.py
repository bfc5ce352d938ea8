"""Functions named in a configuration: ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from revisual_fast.config import nearest

__all__ = ["check_arguments", "load_function", "nearest"]


def load_function(spec: str, where: str) -> Callable[..., Any]:
    """The function that ``spec`` names; ``where`` is the configuration key, for messages.

    Raises ValueError if the form is wrong, the file, the module or the function does not exist, or it is not callable.
    Whatever the user's own file raises while it is imported passes through.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(f"{where}: {spec!r} is not of the form package.module:function or file.py:function")
    module = _file(place, where) if place.endswith(".py") else _module(place, where)
    if not hasattr(module, name):
        defined = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{where}: {place} has no function {name!r}{nearest(name, defined)}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{where}: {spec} is a {type(function).__name__}, not a function")
    return function


def check_arguments(function: Callable[..., Any], args: Mapping[str, Any], where: str, *, positional: int = 0) -> None:
    """Raise ValueError unless ``function`` takes ``positional`` arguments and the keywords ``args``."""
    try:
        inspect.signature(function).bind(*[None] * positional, **args)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; the function takes {inspect.signature(function)}") from None


def _file(place: str, where: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {path}")
    name = f"_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(place: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports
        fix = "install it, or name a file as path/to/file.py:function"
        raise ValueError(f"{where}: no module named {error.name!r} ({fix})") from None
