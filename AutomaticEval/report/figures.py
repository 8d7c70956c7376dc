"""What is drawn of each kind of result file, as PNGs beside one another in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from AutomaticEval.errors import StoreError
from AutomaticEval.report.bars import before_and_after, top_heads
from AutomaticEval.report.heatmap import Panel, PerHead, heatmaps
from AutomaticEval.store.disk.json_files import read_json, write_json
from AutomaticEval.store.disk.whole_files import new_file, new_files, prepare_file

Result = Mapping[str, Any]
SIGNIFICANT = 0.05


def draw(result: Result, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Draw a result, as `read_json` reads it. Returns the figures. Raises StoreError for one that is not whole, PathExists."""
    check_figures([(result, folder)], overwrite=overwrite)
    files = [folder / name for name in names_of(str(result.get("kind")))]
    for file in files:
        with new_file(file, overwrite=overwrite) as partial:
            try:
                _FIGURES[result["kind"]][file.name](result, partial)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as broken:
                raise StoreError(
                    f"this is no whole result of the kind {result['kind']!r}: {type(broken).__name__} {broken}."
                ) from broken
    return files


def save_with_figures(file: Path, result: Result) -> list[Path]:
    """Write a result as JSON, and its figures beside it: all of them or none, so that the same command can be given again. Returns the files.

    Raises StoreError, DiskFull.
    """
    with new_files(file.parent, file.name) as made:
        write_json(made / file.name, result)
        written = [made / file.name, *draw(read_json(made / file.name), made)]
    return [file.parent / each.name for each in written]


def check_figures(results: Sequence[tuple[Result, Path]], *, overwrite: bool = False) -> None:
    """Raises StoreError for a kind without figures, and for results whose figures would be the same files; PathExists."""
    files = [folder / name for result, folder in results for name in names_of(str(result.get("kind")))]
    for number, file in enumerate(files):
        if file in files[:number]:
            raise StoreError(f"two of these results draw {file}; name a folder for each.")
    for file in files:
        prepare_file(file, overwrite=overwrite)


def names_of(kind: str) -> list[str]:
    if kind not in _FIGURES:
        raise StoreError(f"there are no figures of {kind!r}; there are of {', '.join(_FIGURES)}.")
    return list(_FIGURES[kind])


def comparison_panels(pre: PerHead, fine: PerHead, change: PerHead) -> list[Panel]:
    """Both on one scale of colours."""
    unit = "R_h: mean L2 norm over tokens"
    every = [value for value in (*pre.values(), *fine.values()) if value is not None]
    ends = (min(every), max(every))
    return [
        Panel("Before fine-tuning", pre, unit, ends=ends),
        Panel("After fine-tuning", fine, unit, ends=ends),
        Panel("Change (after - before)", change, "change of R_h", diverging=True),
    ]


def _strength(result: Result, path: Path) -> None:
    values = {(each["layer"], each["head"]): each["R_h"] for each in result["heads"]}
    unit = f"mean L2 norm of {result['of']} over tokens"
    heatmaps([Panel(f"Head strength, {Path(result['model']).name}", values, unit)], path)


def _comparison(result: Result, path: Path) -> None:
    heatmaps(comparison_panels(*(_by_head(result[name]) for name in ("pre_tuned", "fine_tuned", "differences"))), path)


def _by_head(named: Mapping[str, float]) -> PerHead:
    found = {}
    for name, value in named.items():
        layer, _, head = name.partition(":")
        found[int(layer), int(head)] = value
    return found


def _answers(result: Result, path: Path) -> None:
    title = f"{Path(result['settings']['model']).name}, {len(result['samples'])} prompts"
    before_and_after(result["summary"], result["units"], title, path)


def _recovered(result: Result, path: Path) -> None:
    """Draws, for patching with pairs, which part of the logit difference the patched values brought back."""
    about = result["settings"]
    title = f"{Path(about['model']).name}, {len(result['samples'])} pairs: {about['site']} of {about['places']}"
    known = {name: found for name, found in result["summary"].items() if found["mean"] is not None}
    top_heads([(title, "part of the logit difference", known)], path)


def _screened(result: Result, path: Path) -> None:
    """A row a score, on one scale of colours; a column a category."""
    panels = []
    for score, (name, unit, _) in _SCORES.items():
        known = [each[score][name] for each in result["scores"] if each[score][name] is not None]
        ends = (min(known), max(known)) if known else None
        for category, scores in _by_category(result).items():
            values = {place: each[score][name] for place, each in scores.items()}
            panels.append(Panel(f"{category}: {score}", values, unit, diverging=True, ends=ends))
    heatmaps(panels, path, columns=len(_by_category(result)))


_SCORES: dict[str, tuple[str, str, str]] = {
    "strength": ("d", "Cohen's d against neutral", "Change of strength"),
    "attention": ("mean", "attention above uniform", "Attention to keywords"),
    "direct": ("mean", "logits", "Direct effect"),
}
"""Score -> its number, the unit, and a title."""


def _by_category(result: Result) -> dict[str, dict[tuple[int, int], Any]]:
    found: dict[str, dict[tuple[int, int], Any]] = {}
    for each in result["scores"]:
        found.setdefault(each["category"], {})[each["layer"], each["head"]] = each
    return found


def _screened_top(result: Result, path: Path) -> None:
    panels = []
    for score, (name, unit, title) in _SCORES.items():
        changes = {}
        for each in result["scores"]:
            found, star = each[score], "*" if (each[score].get("p") or 1.0) < SIGNIFICANT else ""
            if found[name] is not None:
                label = f"{each['layer']}:{each['head']} {each['category']}{star}"
                changes[label] = {"mean": found[name], "interval": found.get("interval")}
        panels.append(
            (f"{title}{f' (*: p < {SIGNIFICANT} in its category)' if score == 'strength' else ''}", unit, changes)
        )
    top_heads(panels, path)


def _swept(result: Result, path: Path) -> None:
    means = _means(result)
    known = [value for _, _, values in means for value in values.values() if value is not None]
    ends = (min(known), max(known)) if known else None
    panels = [Panel(title, values, unit, diverging=True, ends=ends) for title, unit, values in means]
    across = "Position, counted from the end" if "position" in result["places"][0] else "Head"
    heatmaps(panels, path, across=across)


def _means(result: Result) -> list[tuple[str, str, PerHead]]:
    """For each measure: (title, unit, mean of each head)."""
    places, about = result["places"], result["settings"]
    return [
        (
            f"{Path(about['model']).name}: {name} ({about['site']})",
            unit,
            {_place(each): each[name]["mean"] for each in places},
        )
        for name, unit in result["units"].items()
    ]


def _place(each: Mapping[str, Any]) -> tuple[int, int]:
    return each["layer"], each["head"] if "head" in each else each["position"]


def _swept_top(result: Result, path: Path) -> None:
    panels = []
    for (title, unit, _), name in zip(_means(result), result["units"], strict=True):
        own = {_place(each): each[name] for each in result["places"] if each[name]["mean"] is not None}
        panels.append((title, unit, {f"{layer}:{place}": found for (layer, place), found in own.items()}))
    top_heads(panels, path)


_FIGURES: dict[str, dict[str, Callable[[Result, Path], None]]] = {
    "strength": {"head_strength.png": _strength},
    "comparison": {"comparison_heatmap.png": _comparison},
    "screening": {"head_reaction_heatmap.png": _screened, "top_heads.png": _screened_top},
    "ablation": {"ablation_sentiment_comparison.png": _answers},
    "patching": {"patching_keyword_comparison.png": _answers},
    "pairs": {"patching_recovered.png": _recovered},
    "sweep": {"sweep_heatmap.png": _swept, "sweep_top_heads.png": _swept_top},
}
