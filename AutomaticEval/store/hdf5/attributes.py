"""Reads and checks attributes: the root attributes, in which a file describes itself, and single ones of datasets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from AutomaticEval.errors import NewerFormat, NotActivations
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.hdf5 import contract

_OURS = ("format", "format_version", "model", "created", "settings", "replaces", "state", "attributes_xxh3_64")
_FLAT = 64
"""A setting inside other settings is compared under the names of all of them, joined. Together these names may be at most so many times as
long as the text of the settings; else a small file could ask for any amount of memory."""
_MOST_LAYERS = 2**16
_TEXT_TYPE = h5py.h5t.py_create(contract.TEXT)


class RootAttributes(NamedTuple):
    """The root attributes of a file."""

    text: dict[str, str]
    """Name -> value, of all of them."""

    version: tuple[int, int]
    model: str
    settings: dict[str, Any]
    replaces: list[str]
    """The shards in its folder whose place it takes."""


def root_attributes(path: Path, file: h5py.File, file_format: str) -> RootAttributes:
    """Read and check the root attributes. file_format: the value that the attribute `format` must have.

    Raises NotActivations, NewerFormat, and KeyError or ValueError for what the format does not allow.
    """
    text: dict[str, str] = {}
    for name in file.attrs:
        try:
            text[name] = str(attribute_of(file, name))
        except (ValueError, TypeError):  # another program wrote it, perhaps with a type that h5py does not know
            if name in _OURS:
                raise
    format_there = text.get("format")
    if format_there != file_format:
        raise NotActivations(
            f"{path} is HDF5, but not ours: its format attribute is {format_there!r}, expected {file_format!r}."
        )
    version = _version(path, text.get("format_version", "none"))
    return RootAttributes(
        text, version, text["model"], _settings(text["settings"]), _replaces(text.get("replaces", "[]"))
    )


def _version(path: Path, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", text)
    if match is None or int(match[1]) != contract.VERSION[0]:
        ours = ".".join(map(str, contract.VERSION))
        raise NewerFormat(
            f"{path} has format version {text[:40]!r}; this version reads up to {ours}, and later ones of "
            f"{contract.VERSION[0]}. Upgrade AutomaticEval."
        )
    return int(match[1]), int(match[2])


def _settings(text: str) -> dict[str, Any]:
    settings = parse_json(text)
    if not isinstance(settings, dict):
        raise ValueError(f"settings is {text[:40]}, expected a JSON object")
    if _n_flat(settings, 0) > _FLAT * len(text):
        raise ValueError(f"the names in settings take more than {_FLAT} times the text of it")
    shape, pruned = settings.get("shape", {}), settings.get("pruned_from", [])
    if not isinstance(shape, dict) or not all(isinstance(each, int | None) for each in shape.values()):
        raise ValueError("the setting shape is not an object of whole numbers")
    heads = settings.get("heads") or {}
    if not isinstance(heads, dict) or not all(isinstance(each, int) and each > 0 for each in heads.values()):
        raise ValueError("the setting heads is not an object of whole numbers above 0")
    if not 0 <= (shape.get("n_layers") or 0) <= _MOST_LAYERS:
        raise ValueError(f"the setting shape has {shape['n_layers']} layers; at most {_MOST_LAYERS} are read")
    if not isinstance(pruned, list):
        raise ValueError("the setting pruned_from is no list")
    return settings


def _n_flat(settings: Mapping[str, Any], n_before: int) -> int:
    """Characters of the names of all settings, each joined with the names of the settings that it is inside."""
    return sum(
        _n_flat(value, n_before + len(name) + 1) if isinstance(value, dict) and value else n_before + len(name)
        for name, value in settings.items()
    )


def _replaces(text: str) -> list[str]:
    names = parse_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"replaces is {text[:40]}, expected a JSON list of shards")
    for name in names:
        contract.shard_number(name)
    return names


def attribute_of(item: h5py.HLObject, name: str) -> Any:
    """An attribute that is one text or one whole number. Raises ValueError, without reading it, for any other; KeyError when it is missing."""
    attribute = h5py.h5a.open(item.id, name.encode("utf-8", "surrogateescape"))
    is_single, stored = attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR, attribute.get_type()
    if not is_single or stored.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER):
        raise ValueError(f"the attribute {name} of {item.name} is neither one text nor one whole number")
    if stored.get_class() == h5py.h5t.INTEGER or not stored.is_variable_str():
        return item.attrs[name]
    read = np.empty((), dtype=contract.TEXT)  # h5py does the same, but asks for type and shape once more
    attribute.read(read, mtype=_TEXT_TYPE)
    text = read[()]
    return text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text


def text_of(item: h5py.HLObject, name: str) -> str:
    """An attribute that is text. Raises ValueError for any other, KeyError when it is missing."""
    value = attribute_of(item, name)
    if not isinstance(value, str):
        raise ValueError(f"the attribute {name} of {item.name} is {value!r}, expected text")
    return value


def attribute_text(text: str) -> str:
    """The text as a root attribute holds it. HDF5 holds neither U+0000 nor lone surrogates; they are escaped (`\\udc80`)."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
