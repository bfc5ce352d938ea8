"""Reading a configuration: YAML, ``extends``, ``--set`` overrides, and errors that name the key and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from revisual_fast.config import Config, GRPOConfig, SFTConfig, nearest

__all__ = ["ConfigError", "load_config"]


class _Loader(yaml.SafeLoader):
    """YAML with the booleans and floats of version 1.2: ``off`` is a word and ``1e-6`` a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_BOOL = "true|True|TRUE|false|False|FALSE"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(f"^({_BOOL})$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({_FLOAT})$"), list("-+.0123456789"))


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the fix."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path``, apply ``overrides`` (each ``a.b=c``) and validate.

    A file may name another with ``extends: ../base.yaml``: mappings are merged key by key, everything else is replaced.
    An override's value is read as YAML. Relative data paths are resolved against the folder of the file that names
    them; ``run.dir`` and ``model.path`` against the working directory. Raises :class:`ConfigError`, which names the
    file, the key, the value and what is allowed.
    """
    path = Path(path)
    tree = _read(path, seen=())
    for override in overrides or []:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, tree, e) for e in error.errors())) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in ``path``, merged over what it extends, with its data paths made absolute."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(str(p) for p in seen)}")
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(tree).__name__}")
    _absolute_paths(tree, path.resolve().parent)
    base = tree.pop("extends", None)
    return tree if base is None else _merge(_read(path.parent / base, (*seen, path.resolve())), tree)


def _absolute_paths(tree: dict[str, Any], folder: Path) -> None:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(v) for v in value]
        return str(folder / value) if isinstance(value, str) else value

    def absolute_function(value: Any) -> Any:
        file, _, name = str(value).rpartition(":")
        return f"{folder / file}:{name}" if file.endswith(".py") else value

    for dataset in (tree.get("data") or {}).values():
        for key in ("path", "image_root"):
            if isinstance(dataset, dict) and dataset.get(key) is not None:
                dataset[key] = absolute(dataset[key])
    functions = list((tree.get("data") or {}).values())
    for stage in (tree.get("stages") or {}).values():
        functions += list((stage.get("rewards") or {}).values()) if isinstance(stage, dict) else []
    for section in functions:
        if isinstance(section, dict) and section.get("function"):
            section["function"] = absolute_function(section["function"])


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, for example train.max_steps=3")
    *parents, leaf = key.strip().split(".")
    node = tree
    for i, name in enumerate(parents):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: i + 1])} is a value, not a section")
    try:
        node[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None


def _explain(path: Path, tree: dict[str, Any], error: Any) -> str:
    """One line for one pydantic error: file, key, what is wrong, what is allowed."""
    key = ".".join(str(part) for part in error["loc"] if part not in ("sft", "grpo"))
    if error["type"] == "extra_forbidden":
        parent, _, leaf = key.rpartition(".")
        fields = _fields_at(parent.split(".") if parent else [], tree)
        return f"{path}: unknown key {key!r}{nearest(leaf, fields)}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f" (given: {error['input']!r})"
    return f"{path}: {key or 'configuration'}: {message}{given}"


def _fields_at(parts: list[str], tree: dict[str, Any]) -> list[str]:
    """Names of the fields allowed in the section at ``parts``; for suggestions only."""
    model: Any = Config
    node: Any = tree
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else None
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        elif get_args(model) and get_args(model)[0] is str:  # dict[str, Section]
            model = get_args(model)[1]
        model = _pick(model, node)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _pick(model: Any, node: Any) -> Any:
    """The section class inside an optional or a stage union."""
    while hasattr(model, "__metadata__"):
        model = model.__origin__
    if get_args(model) == (SFTConfig, GRPOConfig):
        return GRPOConfig if isinstance(node, dict) and node.get("kind") == "grpo" else SFTConfig
    sections = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)]
    optional = type(None) in get_args(model)
    return sections[0] if optional and sections else model
