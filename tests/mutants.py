"""Small files and runs of every kind that the format has, and changes to them, each drawn from a seed: bytes, attributes, datasets.

Bytes of HDF5's own structures are changed only where a trailer covers them, which refuses the file before HDF5 sees it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from conftest import ROOT
from test_store import SETTINGS, make_sample, write_run

from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.hdf5.trailer import arrays_of, write_trailer
from AutomaticEval.store.hdf5.write import write_file

Span = tuple[int, int]
"""Where something begins and how many bytes it has."""


class Seed(NamedTuple):
    """A valid file before it is changed, with the places in it."""

    raw: bytes
    arrays: Sequence[Span]
    """Numbers."""

    texts: Sequence[Span]
    """What attributes and columns say."""

    end: int
    """Where HDF5's bytes end and the trailer begins; without one, all of them."""


Case = dict[str, Seed]
"""Name -> file: one alone, or those of a run."""


def corpus(folder: Path) -> dict[str, Case]:
    """Writes the files of this version into a folder, and takes those of earlier ones as they are kept."""
    said = {"settings": {**SETTINGS, "run_id": "x", "shape": {"n_layers": 1, "n_heads": 2}}}
    columns: dict[str, Any] = {"task": "t", "logprob": -1.5, "correct": True, "metrics": {"none": {"acc": [1.0, None]}}}
    for name, dtype, changes in (
        ("float32", torch.float32, {}),
        ("bfloat16", torch.bfloat16, {}),
        ("int8", torch.float32, {"in_8_bits": True}),
        ("gzip", torch.float32, {"compression": "gzip"}),
    ):
        samples = [make_sample(dtype, seed=number, doc_id=number, **columns) for number in range(3)]
        held = of_samples(samples, "m", said["settings"], in_8_bits=changes.pop("in_8_bits", False))
        (folder / name).mkdir()
        write_file(folder / name / "one.h5", held, **changes)  # type: ignore[arg-type]
    for name in ("run", "unfinished"):
        write_run(folder / name, 3, shard_bytes=700)
    (folder / "unfinished" / "run.h5").unlink()
    kept = ROOT / "tests" / "data"
    folders = [path for path in folder.iterdir() if path.is_dir()]
    old = sorted(path for path in kept.rglob("*") if path.is_dir() and (path / "run.h5").exists())
    found = {path.name: case_of(path.glob("*.h5")) for path in sorted(folders)}
    found |= {str(path.relative_to(kept)): case_of(path.glob("*.h5")) for path in old}
    return found | {str(path.relative_to(kept)): case_of([path]) for path in sorted(kept.glob("*/*.h5"))}


def case_of(paths: Any) -> Case:
    return {path.name: seed_of(path) for path in sorted(paths)}


def seed_of(path: Path) -> Seed:
    raw = path.read_bytes()
    end = len(raw)
    if raw.endswith(b"AEvalEnd"):
        end -= 16 + int.from_bytes(raw[-16:-8], "little")
    with h5py.File(path) as file:
        arrays, said = arrays_of(file), texts_of(file)
    places = {(at, len(text)) for text in said if len(text) > 3 and (at := raw.find(text, 0, end)) >= 0}
    return Seed(raw, [(at, size) for at, size in arrays if size], sorted(places), end)


def texts_of(file: h5py.File) -> set[bytes]:
    found = {str(value).encode() for value in file.attrs.values()}

    def look(name: str, item: Any) -> None:
        found.update(str(value).encode() for value in item.attrs.values())
        if isinstance(item, h5py.Dataset) and h5py.check_string_dtype(item.dtype) is not None:
            found.update(item[()].tolist())

    file.visititems(look)
    return found


def write_case(case: Case, folder: Path) -> None:
    for name, seed in case.items():
        (folder / name).write_bytes(seed.raw)


def mutate(case: Case, folder: Path, draw: random.Random) -> str:
    """Change one file of a case that was written into a folder. Returns what was done."""
    name = draw.choice(list(case))
    path, seed = folder / name, case[name]
    if draw.random() < 0.7:
        return f"{name}: {change_bytes(path, seed, draw)}"
    done = change_objects(path, draw)
    if "run.h5" in case and name != "run.h5" and draw.random() < 0.7:
        done += "; run.h5 told" if tell_index(folder, name) else ""
    return f"{name}: {done}"


# ---- bytes


def change_bytes(path: Path, seed: Seed, draw: random.Random) -> str:
    made, has_trailer = bytearray(seed.raw), seed.end < len(seed.raw)
    kinds = ["numbers", "text", "cut", "more"] + (["anywhere", "range", "trailer"] if has_trailer else [])
    kind = draw.choice(kinds)
    if kind == "cut":
        return cut(path, made, seed, draw)
    if kind == "more":
        path.write_bytes(made + draw.randbytes(draw.choice([1, 8, 16, 500])))
        return "bytes appended"
    if kind in ("anywhere", "trailer"):
        flip(made, (seed.end, len(made) - seed.end) if kind == "trailer" else (0, seed.end), draw)
    elif kind == "range":
        splice(made, (0, seed.end), draw)
    else:
        span = draw.choice(seed.arrays if kind == "numbers" else seed.texts)
        draw.choice([flip, splice, flip if kind == "numbers" else retype])(made, span, draw)
        if has_trailer and (kind == "text" or draw.random() < 0.5):
            del made[seed.end :]
            path.write_bytes(made)
            if draw.random() < 0.7:
                write_trailer(path, list(arrays_in(seed)))
                return f"{kind}, with a right trailer"
            return f"{kind}, without a trailer"
    path.write_bytes(made)
    return kind


def arrays_in(seed: Seed) -> Sequence[Span]:
    """As the trailer of the file has them."""
    length = int.from_bytes(seed.raw[-16:-8], "little")
    return [(at, size) for at, size in json.loads(seed.raw[-16 - length : -16])["arrays"]]


def cut(path: Path, made: bytearray, seed: Seed, draw: random.Random) -> str:
    at = draw.choice([0, 1, 8, len(made) - 1, len(made) - 16, seed.end, draw.randrange(len(made))])
    path.write_bytes(made[:at])
    return f"cut at {at}"


def flip(made: bytearray, span: Span, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 2, 8])):
        made[span[0] + draw.randrange(span[1])] ^= 1 << draw.randrange(8)


def splice(made: bytearray, span: Span, draw: random.Random) -> None:
    """Zeros, ones, random bytes or other bytes of the file in the place of a range."""
    size = min(span[1], draw.choice([1, 4, 8, 64, 512, span[1]]))
    at, there = span[0] + draw.randrange(span[1] - size + 1), draw.randrange(len(made) - size + 1)
    made[at : at + size] = draw.choice([bytes(size), b"\xff" * size, draw.randbytes(size), made[there : there + size]])


def retype(made: bytearray, span: Span, draw: random.Random) -> None:
    """Characters that mean something in JSON, numbers and paths, in the place of some."""
    for _ in range(draw.choice([1, 2, 4])):
        made[span[0] + draw.randrange(span[1])] = draw.choice(b'{}[]",:\\/.-0129eE xu\x00\x1b\x80\xc3\xff')


# ---- objects


DEEP = "[" * 5000 + "]" * 5000
NUMBERS = (0, -1, 1, 2, 7, 127, 128, 255, 2**15, 2**31 - 1, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, -(2**63))
JSONS: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    math.inf,
    math.nan,
    "",
    "x",
    "\0",
    "\ud800",
    "../x",
    "shard-00000.h5",
    "float16",
    [],
    [None],
    [[]],
    ["shard-00001.h5"],
    {},
    {"": None},
    {"a.b": {"c": 1}},
    {"n_layers": -1},
    {"n_heads": "two"},
)
TEXTS = (
    "",
    "x",
    "²",
    "1.2",
    "1.0",
    "1.99",
    "2.0",
    "-1",
    "float16",
    "bfloat16",
    "int8",
    "json",
    "utf-8",
    "int",
    "bool",
    "0" * 16,
    "0x1",
    "finished",
    "zażółć 你好 🙂",
    "../../etc/passwd",
    "shard-00000.h5",
    "shard-00001.h5",
    "x" * 60_000,
    "\x1b[2J",
    '"',
    "{",
    "NaN",
    "1e999",
    "null",
    "1" * 5000,
    "[1] x",
    DEEP,
    '{"a": ' * 101 + "1" + "}" * 101,
)
ODD: tuple[Callable[[], Any], ...] = (
    lambda: h5py.Empty("f4"),
    lambda: h5py.Empty(h5py.string_dtype()),
    lambda: np.array(["a", "b"], dtype=h5py.string_dtype()),
    lambda: np.array([b"x" * 30_000] * 2),
    lambda: np.zeros(5000),
    lambda: np.zeros((2, 2), "<i8"),
    lambda: np.array([], "<i4"),
    lambda: np.bytes_(b"\xff\xfe\x80"),
    lambda: np.bytes_(b"utf-8"),
    lambda: 1.5,
    lambda: np.complex64(1),
    lambda: np.uint64(2**64 - 1),
    lambda: True,
    lambda: np.array((1, 2.0), dtype=[("a", "i4"), ("b", "f8")]),
    lambda: np.void(b"abc"),
    lambda: np.array(h5py.Reference(), dtype=h5py.ref_dtype),
    lambda: np.array([np.arange(3), np.arange(2)], dtype=h5py.vlen_dtype(np.int32)),
    lambda: np.array(1, dtype=h5py.enum_dtype({"A": 1, "B": 2})),
)
ATTRIBUTES = (
    "format",
    "format_version",
    "model",
    "created",
    "settings",
    "replaces",
    "state",
    "attributes_xxh3_64",
    "dtype",
    "encoding",
    "xxh3_64",
    "non_finite",
    "rows",
    "of another",
)


NAMES = (
    *(
        "x",
        "layer_1",
        "layer_²",
        "layer_99999999999999999999",
        "layer_0.pattern",
        ".hidden",
        "a b",
        b"\xff\xfe",
        "x" * 3000,
    ),
    *("block", "shards", "scales", "checksums", "rows", "correct", "shard", "index", "target", "\x1b[2J", "你好"),
)


def some_json(draw: random.Random, text: str) -> str:
    """Another value somewhere in JSON, or other characters."""
    try:
        value = json.loads(text)
    except ValueError:
        return draw.choice(TEXTS)
    if draw.random() < 0.3:
        raw = bytearray(text.encode() or b" ")
        retype(raw, (0, len(raw)), draw)
        return raw.decode("utf-8", "replace").replace("\0", " ")
    return json.dumps(with_another(value, draw))


def with_another(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        return {**value, key: with_another(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], with_another(value[at], draw), *value[at + 1 :]]
    return draw.choice(JSONS)


def some_value(draw: random.Random, before: Any) -> Any:
    kind = draw.random()
    if isinstance(before, str) and before[:1] in ("{", "[") and kind < 0.6:
        return some_json(draw, before)
    if kind < 0.4:
        return draw.choice(TEXTS)
    if kind < 0.6:
        return np.int64(draw.choice(NUMBERS))
    return draw.choice(ODD)()


def objects_of(file: h5py.File) -> list[Any]:
    found: list[Any] = [file]
    file.visititems(lambda name, item: found.append(item))
    return found


def datasets_of(file: h5py.File) -> list[h5py.Dataset]:
    return [item for item in objects_of(file) if isinstance(item, h5py.Dataset)]


def change_objects(path: Path, draw: random.Random) -> str:
    """One to three changes through HDF5, with checksums made right again or not."""
    done: list[str] = []
    with h5py.File(path, "r+") as file:
        wanted = draw.choice([1, 1, 1, 2, 3])
        for _ in range(20):
            change = draw.choice(CHANGES)
            try:
                done.append(f"{change.__name__} {change(file, draw)}")
            except Exception:  # what h5py or HDF5 cannot make of it
                continue
            if len(done) == wanted:
                break
        if draw.random() < 0.6:
            with_right_root(file)
        trailer = None
        if draw.random() < 0.7:
            with suppress(TypeError):  # names that are no UTF-8
                trailer = arrays_of(file)
    if trailer is not None:
        write_trailer(path, trailer)
    return ", ".join(done) + (", with a right trailer" if trailer is not None else "")


def with_right_root(file: h5py.File) -> None:
    try:
        said = {name: str(value) for name, value in file.attrs.items()}
    except (OSError, TypeError, ValueError):
        return
    if isinstance(file.attrs.get(checksums.OF_ATTRIBUTES), str):
        file.attrs[checksums.OF_ATTRIBUTES] = checksums.of_attributes(said)


def with_right_sums(dataset: h5py.Dataset) -> None:
    """Of the whole, and of its blocks where it has several."""
    if checksums.NAME not in dataset.attrs:  # 1.0
        return
    if h5py.check_string_dtype(dataset.dtype) is not None:
        dataset.attrs[checksums.NAME] = checksums.of_text(dataset[()].tolist())
        return
    raw = np.empty(dataset.shape, f"V{dataset.id.get_type().get_size()}")
    dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, raw, mtype=dataset.id.get_type())
    row_bytes = raw.dtype.itemsize * math.prod(raw.shape[1:])
    rows = dataset.chunks[0] if dataset.chunks else checksums.rows_per_block(row_bytes)
    hashed = checksums.ArrayHash(rows * row_bytes)
    hashed.add(raw)
    dataset.attrs[checksums.NAME] = hashed.hexdigest()
    blocks = dataset.file.get(f"checksums{dataset.name}")
    if isinstance(blocks, h5py.Dataset) and len(blocks) == len(hashed.blocks()):
        blocks[:] = hashed.blocks()
        blocks.attrs[checksums.NAME] = checksums.of_numbers([blocks[()]])


def tell_index(folder: Path, name: str) -> bool:
    """Have `run.h5` say of a shard what it now is, as one who means harm would."""
    try:
        with h5py.File(folder / name) as shard:
            stamp = shard.attrs.get(checksums.OF_ATTRIBUTES)
        with h5py.File(folder / "run.h5", "r+") as file:
            if "shards/size_bytes" not in file:  # 1.0
                return False
            number = file["shards/name"].asstr()[()].tolist().index(name)
            file["shards/size_bytes"][number] = (folder / name).stat().st_size
            if isinstance(stamp, str):
                file["shards/attributes_xxh3_64"][number] = stamp
            for each in ("size_bytes", "attributes_xxh3_64"):
                with_right_sums(file[f"shards/{each}"])
            arrays = arrays_of(file)
    except (OSError, ValueError, TypeError, KeyError):
        return False
    write_trailer(folder / "run.h5", arrays)
    return True


def attribute(file: h5py.File, draw: random.Random) -> str:
    item = file if draw.random() < 0.5 else draw.choice(objects_of(file))
    name = draw.choice([*item.attrs, draw.choice(ATTRIBUTES)])
    if name in item.attrs and draw.random() < 0.1:
        del item.attrs[name]
        return f"{item.name} {name} deleted"
    value = some_value(draw, item.attrs.get(name))
    if name in item.attrs:
        del item.attrs[name]
    item.attrs[name] = value
    return f"{item.name} {name} = {str(value)[:60]!r}"


def numbers(file: h5py.File, draw: random.Random) -> str:
    """Some numbers changed, their checksums made right."""
    every = [each for each in datasets_of(file) if each.dtype.kind in "iuf" and each.size and not each.is_virtual]
    dataset = draw.choice(every)
    values = dataset[()]
    flat = values.reshape(-1)
    for _ in range(draw.choice([1, 1, 3])):
        bound = np.iinfo(flat.dtype) if flat.dtype.kind in "iu" else None
        number: Any = draw.choice(NUMBERS if bound else (*NUMBERS, math.nan, math.inf, 1e38))
        flat[draw.randrange(len(flat))] = number if bound is None else max(bound.min, min(bound.max, number))
    dataset[...] = values
    if draw.random() < 0.8:
        with_right_sums(dataset)
    return str(dataset.name)


def texts(file: h5py.File, draw: random.Random) -> str:
    """One text of a column changed, its checksum made right."""
    dataset = draw.choice([each for each in datasets_of(file) if h5py.check_string_dtype(each.dtype) and each.size])
    at = draw.randrange(len(dataset))
    before = dataset.asstr()[at]
    value = some_json(draw, before) if draw.random() < 0.6 else draw.choice([*TEXTS, b"\xff\x80"])
    dataset[at] = value
    if draw.random() < 0.3:
        dataset.attrs["encoding"] = draw.choice(["json", "utf-8", "int"])
    if draw.random() < 0.8:
        with_right_sums(dataset)
    return f"{dataset.name}[{at}] = {str(value)[:60]!r}"


def shape(file: h5py.File, draw: random.Random) -> str:
    """A dataset with other rows, columns, dimensions or types, its attributes kept."""
    dataset = draw.choice(datasets_of(file))
    name, attributes, before = dataset.name, dict(dataset.attrs), dataset.shape
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    lengths = [0, 1, 2, 3, 12, 18, 100, 9000, *before]
    made = draw.choice([before, (draw.choice(lengths),), (draw.choice(lengths), draw.choice(lengths)), (), (1, 1, 1)])
    huge = draw.random() < 0.15
    if huge:
        made = draw.choice([(2**40,), (2**40, 0), (0, 2**40), (*before[:1], 2**31), (2**20, 2**20)])
    kind = draw.choice(
        [dataset.dtype, dataset.dtype, "<i4", "<i8", "<f4", ">i4", "u1", "S4", h5py.string_dtype(), "V3"]
    )
    options: dict[str, Any] = {}
    if made and all(made) and (huge or draw.random() < 0.3):
        options["chunks"] = tuple(min(length, 64) for length in made)
        if not is_text:
            options |= draw.choice(
                [{}, {"compression": "gzip"}, {"shuffle": True}, {"fletcher32": True}, {"scaleoffset": 0}]
            )
    del file[name]
    new = file.create_dataset(name, shape=made, dtype=kind, **options)
    new.attrs.update(attributes)
    if not huge and new.size:
        new[...] = np.zeros(made, np.dtype(kind)) if not h5py.check_string_dtype(np.dtype(kind)) else b"x"
        with_right_sums(new)
    return f"{name} {made} {kind} {options}"


def link(file: h5py.File, draw: random.Random) -> str:
    """Something else in the place of a dataset or group."""
    item = draw.choice(objects_of(file)[1:])
    other = draw.choice(objects_of(file))
    name, kind = (
        item.name,
        draw.choice(["hard", "soft", "external", "group", "virtual", "storage", "type", "gone", "loop"]),
    )
    attributes, length, stored = dict(item.attrs), getattr(item, "shape", (3,)), getattr(item, "dtype", "<f4")
    other_name = other.name
    del file[name]
    if kind == "hard":
        file[name] = file[other_name]
    elif kind == "loop":
        file[name] = file["/"]
    elif kind == "soft":
        file[name] = h5py.SoftLink(draw.choice([other_name, "/", name, "/nothing"]))
    elif kind == "external":
        file[name] = h5py.ExternalLink(draw.choice(["run.h5", "shard-00000.h5", "/etc/passwd"]), name)
    elif kind == "group":
        file.create_group(name).attrs.update(attributes)
    elif kind == "type":
        file[name] = np.dtype("<f4")
    elif kind == "virtual":
        layout = h5py.VirtualLayout(length, stored)
        layout[...] = h5py.VirtualSource(draw.choice([".", "shard-00000.h5", "/etc/passwd"]), name, length)
        file.create_virtual_dataset(name, layout).attrs.update(attributes)
    elif kind == "storage":
        file.create_dataset(name, shape=length, dtype=stored, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        file[name].attrs.update(attributes)
    return f"{name} {kind} {other_name if kind in ('hard', 'soft') else ''}"


def member(file: h5py.File, draw: random.Random) -> str:
    """What no writer of ours puts into a group."""
    group = draw.choice([item for item in objects_of(file) if isinstance(item, h5py.Group)])
    name = draw.choice(NAMES)
    kind = draw.choice(["numbers", "group", "soft", "text", "copy"])
    if kind == "numbers":
        group.create_dataset(name, data=np.zeros(draw.choice([1, 3, 12]), "<i8")).attrs["encoding"] = "int"
    elif kind == "group":
        group.create_group(name)
    elif kind == "soft":
        group[name] = h5py.SoftLink("/nothing")
    elif kind == "text":
        group.create_dataset(name, data=["x"] * draw.choice([1, 3]), dtype=h5py.string_dtype()).attrs["encoding"] = (
            "utf-8"
        )
    else:
        file.copy(draw.choice(objects_of(file)[1:]), group, name=name)
    return f"{group.name} {name!r} {kind}"


CHANGES: tuple[Callable[[h5py.File, random.Random], str], ...] = (
    attribute,
    attribute,
    numbers,
    numbers,
    texts,
    shape,
    link,
    member,
)
