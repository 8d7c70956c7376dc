"""JSON files, written whole or not at all, and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from AutomaticEval.errors import OtherSettings, StoreError
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.disk.whole_files import new_file, prepare_file, prepare_folder

Stats = dict[tuple[int, int], dict[str, float]]
"""(layer, head) -> a dict of R_h, std, min, max and n: how strong the head is."""


def new_results(folder: Path, *names: str, kept: Path | None = None) -> list[Path]:
    """The paths of result files, checked before the work that will fill them. Raises PathExists, FolderNotWritable.

    kept: where the parts that results are made of stay, for the message.
    """
    prepare_folder(folder)
    offer = ", or another folder (-o/--output)"
    if kept is not None and kept.exists():
        offer += f". To add to them, move {', '.join(names)} away and give the command again: what it needs of {kept} is not computed again"
    for name in names:
        prepare_file(folder / name, offer=offer)
    return [folder / name for name in names]


def write_json(path: str | Path, data: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write an object as a JSON file. NaN and infinity become null, as JSON has neither. Raises PathExists, FolderNotWritable."""
    path = Path(path)
    prepare_file(path, overwrite=overwrite)
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_text(json.dumps(finite(data), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with None for each number in it that is infinite or NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises StoreError for a file that is absent, or no JSON, or holds something else."""
    if path.is_dir():
        raise StoreError(f"{path} is a folder; give a result file in it, such as lens.json or probe.json.")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"there is no {path}.") from None
    except (ValueError, OSError):
        raise StoreError(f"{path} is no JSON; give a file that one of these commands wrote.") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds a {type(content).__name__}; a result is an object with a kind.")
    return content


def refuse_others(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises OtherSettings when a folder was made with other settings. before may hold more settings than now; those are not compared."""
    apart = RunSettings.from_dict(before).differences(RunSettings.from_dict(now), str(folder), now.keys())
    if apart:
        raise OtherSettings(
            f"{folder} was made with other settings: {min(apart)}. Name another folder with --output, or give the options that it was made with."
        )


def read_strength(path: str | Path) -> tuple[Stats, str, dict[str, Any]]:
    """The head strengths in a result file, what they were measured of ("result" or "z"), and of which inputs. Raises StoreError for another file.

    The inputs of files of the first versions are an empty dict.
    """
    content = read_json(Path(path))
    try:
        stats = {(each.pop("layer"), each.pop("head")): each for each in content["heads"]}
        if not all({"R_h", "n"} <= each.keys() for each in stats.values()) or not stats:
            raise KeyError("R_h")
        return stats, str(content["of"]), dict(content.get("inputs") or {})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{path} holds no head strengths; give a file that save_results wrote.") from None
