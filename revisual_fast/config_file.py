"""Reading a configuration: YAML, ``extends``, ``--set`` overrides, and errors that name the key and the fix."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from revisual_fast.config import Config, GRPOConfig, SFTConfig, nearest

__all__ = ["ConfigError", "load_config"]


class _Loader(yaml.SafeLoader):
    """YAML with the booleans and floats of version 1.2: ``off`` is a word, ``1e-6`` a number; a key stands once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before ``<<`` is merged in
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands here twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_BOOL = "true|True|TRUE|false|False|FALSE"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(f"^({_BOOL})$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({_FLOAT})$"), list("-+.0123456789"))


_MAPPING = "Input should be a mapping"
_MESSAGES = {  # in place of pydantic's, which speak of Python
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dict_type": _MAPPING,
    "bool_type": "Input should be true or false",
    "list_type": "Input should be a list",
    "tuple_type": "Input should be a list",
}


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
        raise ConfigError("\n".join(f"{path}: {_explain(tree, e)}" for e in error.errors())) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in ``path``, merged over what it extends, with its data paths made absolute."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(str(p) for p in seen)}")
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2025-13-01
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(tree).__name__}")
    _absolute_paths(tree, path.resolve().parent)
    base = tree.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: extends: Input should be the path of a configuration file (given: {base!r})")
    return tree if base is None else _merge(_read(path.parent / base, (*seen, path.resolve())), tree)


def _absolute_paths(tree: dict[str, Any], folder: Path) -> None:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(v) for v in value]
        return str(folder / value) if isinstance(value, str) else value

    datasets = _sections(tree, "data")
    for dataset in datasets:
        for key in ("path", "image_root"):
            if key in dataset:
                dataset[key] = absolute(dataset[key])
    rewards = [reward for stage in _sections(tree, "stages") for reward in _sections(stage, "rewards")]
    for section in datasets + rewards:
        file, _, name = str(section.get("function")).rpartition(":")
        if file.endswith(".py"):
            section["function"] = f"{folder / file}:{name}"


def _sections(tree: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The mappings in the mapping at ``key``; whatever else stands there is for the schema to refuse."""
    node = tree.get(key)
    return [section for section in node.values() if isinstance(section, dict)] if isinstance(node, dict) else []


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
        below = {} if node.get(name) is None else node[name]
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: i + 1])} is a value, not a section")
        node[name] = node = dict(below)  # a copy: an anchor may have put the same mapping elsewhere too
    try:
        node[leaf] = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None


def _explain(tree: dict[str, Any], error: Any) -> str:
    """One line for one pydantic error: the key, what is wrong, what is allowed."""
    loc = error["loc"]
    if loc[:1] == ("stages",):
        loc = loc[:2] + loc[3:]  # pydantic puts the kind after the stage's name
    parts = [str(part) for part in loc if part != "[key]"]
    key, kind = ".".join(parts), error["type"]
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{nearest(parts[-1], _fields_at(parts[:-1], tree))}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing; 'sft' or 'grpo'{_misspelt(tree, *parts)}"
    if kind == "union_tag_invalid":
        return f"{key}.kind: Input should be 'sft' or 'grpo' (given: {error['input']['kind']!r})"
    message = _MESSAGES.get(kind, error["msg"].removeprefix("Value error, "))
    given = "" if kind in ("missing", "value_error") else f" (given: {error['input']!r})"
    hint = _misspelt(tree, *parts) if kind == "value_error" and parts[:1] == ["data"] and len(parts) == 2 else ""
    return f"{key or 'configuration'}: {message}{given}{hint}"


def _misspelt(tree: dict[str, Any], section: str, name: str) -> str:
    """A hint, if ``section.name`` does not say what it is and nearly has the name of another."""
    others = [other for other in tree[section] if other != name and isinstance(other, str)]
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
    complete = {"kind", "path", "hub", "function"} & tree[section].get(name, {}).keys()
    return f" (or did you mean {section}.{close[0]}?)" if close and not complete else ""


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
