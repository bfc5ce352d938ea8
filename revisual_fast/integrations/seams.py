"""Places in other packages that an integration calls or replaces.

What is there is checked by its shape, the names of its parameters, and not by a version: a place that has moved is a
:class:`SeamError` that names it, never a wrong gradient. ``SUPPORTED`` says which versions have been tested.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any
from weakref import WeakMethod

from packaging.specifiers import SpecifierSet

__all__ = [
    *("SUPPORTED", "SeamError", "Supported"),
    *("check_version", "on_unpatch", "patched", "placed", "replace", "seam", "unpatch", "warn_once"),
]


@dataclass(frozen=True)
class Supported:
    """A package an integration is for; docs/integrations.md has the same table, and a test holds them together."""

    package: str  # as pip names it; "" for one that is not on PyPI
    versions: str  # a specifier: what is accepted
    tested: str  # the version the tests ran with; "" where they ran against a stand-in


SUPPORTED: dict[str, Supported] = {
    "trl": Supported("trl", ">=1.16,<2", "1.16.0"),
    "verl": Supported("verl", ">=0.9.1,<0.10", "0.9.1"),
    "easyr1": Supported("", "", ""),
    "openrlhf": Supported("openrlhf", ">=0.11.2,<0.12", "0.11.2"),
    "swift": Supported("ms-swift", ">=4.6,<5", "4.6.0"),
    "liger": Supported("liger-kernel", ">=0.8.5,<0.9", "0.8.5"),
    "transformers": Supported("transformers", ">=5.10", "5.19.0"),
    "hub": Supported("kernels", ">=0.17,<0.18", "0.17.2"),
}
"""Integration -> the package it is for."""


class SeamError(RuntimeError):
    """A place of another package is not what the integration was written for."""


def check_version(integration: str) -> None:
    """Raises ImportError where the package is missing, SeamError for a version that is not in ``SUPPORTED``."""
    wanted = SUPPORTED[integration]
    try:
        found = metadata.version(wanted.package)
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"revisual_fast.integrations.{integration} needs {wanted.package} {wanted.versions}: "
            f"pip install '{wanted.package}{wanted.versions}'"
        ) from None
    if not SpecifierSet(wanted.versions).contains(found, prereleases=True):
        raise SeamError(
            f"revisual_fast.integrations.{integration} is for {wanted.package} {wanted.versions}; {found} is installed"
        )


def seam(place: str, parameters: Sequence[str] = (), *, exact: bool = False) -> Any:
    """The object at ``place``, such as ``trl.trainer.utils:Name.method``.

    ``parameters`` are names that its signature must have, in this order, among others unless ``exact``. Raises
    SeamError, which names the place, where it is not there or has another signature.
    """
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split(".") if path else ():
            found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"{place} is not there ({error}): {_advice(module)}") from error
    found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
    if parameters:
        _check_signature(place, found, parameters, exact)
    return found


def _check_signature(place: str, found: Callable[..., Any], parameters: Sequence[str], exact: bool) -> None:
    names = list(inspect.signature(found).parameters)
    if [name for name in names if exact or name in set(parameters)] != list(parameters):
        raise SeamError(
            f"{place} takes ({', '.join(names)}); expected {', '.join(parameters)} in this order: "
            f"{_advice(place.partition(':')[0])}"
        )


def _advice(module: str) -> str:
    root = module.partition(".")[0]
    for wanted in SUPPORTED.values():
        if wanted.package.replace("-", "_").removeprefix("ms_") == root:
            return f"this integration was tested with {wanted.package} {wanted.tested or 'no installed version'}"
    return "this version of the package is not supported"


@dataclass
class _Replaced:
    owner: Any
    name: str
    original: Any
    present: bool  # whether the owner itself had it
    new: Any


_REPLACED: dict[str, list[_Replaced]] = {}
"""Integration -> what it has replaced, in this order."""
_RESTORE: dict[str, list[WeakMethod[Callable[[], None]]]] = {}
"""Integration -> what else is called to restore."""


def replace(integration: str, owner: Any, name: str, new: Any) -> Any:
    """Set ``owner.name`` (a module, class or instance; for a mapping, ``owner[name]``) until :func:`unpatch`.

    Returns what was there before any replacement by this integration. Replacing again puts the newest in place.
    """
    made = _REPLACED.setdefault(integration, [])
    for entry in made:
        if entry.owner is owner and entry.name == name:
            _put(owner, name, new)
            entry.new = new
            return entry.original
    table = owner if isinstance(owner, dict) else vars(owner)
    present = name in table
    original = table[name] if present else (None if isinstance(owner, dict) else getattr(owner, name, None))
    _put(owner, name, new)
    made.append(_Replaced(owner, name, original, present, new))
    return original


def on_unpatch(integration: str, restore: Callable[[], None]) -> None:
    """Have :func:`unpatch` call the bound method ``restore``, as long as its object is alive."""
    _RESTORE.setdefault(integration, []).append(WeakMethod(restore))


def patched(integration: str) -> bool:
    """Whether the integration has replaced something."""
    return bool(_REPLACED.get(integration))


def unpatch(integration: str | None = None) -> None:
    """Restore what ``integration`` has replaced, or everything; harmless where there is nothing to restore.

    Raises ValueError for an integration that does not exist, SeamError where somebody else has replaced the same place
    since: that is left alone, everything else is restored.
    """
    if integration is not None and integration not in SUPPORTED:
        raise ValueError(f"there is no integration {integration!r}; there are {', '.join(SUPPORTED)}")
    kept = []
    for name in [integration] if integration else list(SUPPORTED):
        for reference in reversed(_RESTORE.pop(name, [])):
            if restore := reference():
                restore()
        for entry in reversed(_REPLACED.pop(name, [])):
            table = entry.owner if isinstance(entry.owner, dict) else vars(entry.owner)
            if table.get(entry.name) is not entry.new:
                kept.append(entry)
            elif entry.present:
                _put(entry.owner, entry.name, entry.original)
            else:
                _remove(entry.owner, entry.name)
    if kept:
        places = ", ".join(f"{getattr(e.owner, '__name__', type(e.owner).__name__)}.{e.name}" for e in kept)
        raise SeamError(f"{places} was replaced by somebody else after revisual_fast did; left as it is")


@contextmanager
def placed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, ``owner.name`` (a module's or an instance's own, past any ``__setattr__``) is ``value``."""
    before = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before


_SAID: set[str] = set()


def warn_once(message: str, said: set[str] = _SAID, *, stacklevel: int = 3) -> None:
    """A RuntimeWarning, given once in the process, or once in the life of ``said``: what is left to the other package.

    Messages that differ in their numbers only are one. ``stacklevel`` as in :func:`warnings.warn`: 3 blames whoever
    called the function that calls this one.
    """
    kind = re.sub(r"\d+", "#", message)
    if kind not in said:
        said.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _remove(owner: Any, name: str) -> None:
    if isinstance(owner, dict):
        del owner[name]
    else:
        delattr(owner, name)
