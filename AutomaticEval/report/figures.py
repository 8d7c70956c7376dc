"""The figures of each kind of result, as PNG or SVG files in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.report.bars import SIGNIFICANT, before_and_after, top_heads
from AutomaticEval.report.by_scale import by_scale
from AutomaticEval.report.experts_figure import experts_figure
from AutomaticEval.report.heatmap import Panel, PerHead, heatmaps, robust_ends
from AutomaticEval.report.layers.geometry_figures import between_figure, scatter_figure, shape_figure, two_runs_figure
from AutomaticEval.report.layers.lens_figure import lens_figure, tuned_figure
from AutomaticEval.report.layers.question_figure import question_figure
from AutomaticEval.report.probes.by_layer import probe_figure
from AutomaticEval.report.probes.by_question import reliability_figure, risk_coverage_figure
from AutomaticEval.report.probes.grid import grid_figure
from AutomaticEval.report.probes.transfer import transfer_figure
from AutomaticEval.report.two_runs import two_runs
from AutomaticEval.store.disk.json_files import read_json, write_json
from AutomaticEval.store.disk.whole_files import new_file, new_files, prepare_file

FORMATS = ("png", "svg")
ResultJson = Mapping[str, Any]
"""A result as its file holds it: a kind, and what was measured."""


def draw(result: ResultJson, folder: Path, file_format: str = "png", *, overwrite: bool = False) -> list[Path]:
    """Draw a result into a folder. Returns the figures. file_format: png or svg.

    Raises StoreError for a result that lacks something, PathExists, SelectionError for another format.
    """
    check_figures([(result, folder)], file_format, overwrite=overwrite)
    files = []
    for name in _drawn_of(result):
        files.append((folder / name).with_suffix(f".{file_format}"))
        with new_file(files[-1], overwrite=overwrite) as partial:
            try:
                _FIGURES[result["kind"]][name](result, partial)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as broken:
                raise StoreError(
                    f"this is no whole result of the kind {result['kind']!r}: {type(broken).__name__} {broken}."
                ) from broken
    return files


def save_with_figures(
    file: Path, result: ResultJson, beside: Mapping[str, Callable[[Path], None]] = MappingProxyType({})
) -> list[Path]:
    """Write a result as JSON and its figures beside it. Returns the files. beside: name of another file -> what writes it to a path.

    All of them are written or none, so that the same command can be given again. Raises StoreError, DiskFull.
    """
    with new_files(file.parent, file.name) as made:
        write_json(made / file.name, result)
        written = [made / file.name, *draw(read_json(made / file.name), made)]
        for name, write in beside.items():
            write(made / name)
            written.append(made / name)
    return [file.parent / each.name for each in written]


def check_figures(
    results: Sequence[tuple[ResultJson, Path]], file_format: str = "png", *, overwrite: bool = False
) -> None:
    """Raises StoreError for a kind without figures and for two results that would be drawn into the same file, PathExists for a file that exists,
    SelectionError for a format that is not one of FORMATS."""
    if file_format not in FORMATS:
        raise SelectionError(f"no format {file_format!r} of figures; there are {', '.join(FORMATS)}.")
    files = [(folder / name).with_suffix(f".{file_format}") for result, folder in results for name in _drawn_of(result)]
    for number, file in enumerate(files):
        if file in files[:number]:
            raise StoreError(f"two of these results draw {file}; name a folder for each.")
    for file in files:
        prepare_file(file, overwrite=overwrite)


def names_of(kind: str) -> list[str]:
    """The file names of a kind's figures. Raises StoreError for a kind without figures."""
    if kind not in _FIGURES:
        raise StoreError(f"there are no figures of {kind!r}; there are of {', '.join(_FIGURES)}.")
    return list(_FIGURES[kind])


def _drawn_of(result: ResultJson) -> list[str]:
    """The file names of a result's figures, without those of what it does not hold. Raises StoreError for a kind without figures."""
    names = names_of(str(result.get("kind")))
    held = [name for name in names if _PARTS.get(name) is None or _PARTS[name] in result]
    return held or names


def comparison_panels(pre: PerHead, fine: PerHead, change: PerHead) -> list[Panel]:
    """Heatmaps of the strengths before and after, on one scale of colours, and of their change."""
    unit = "R_h: mean L2 norm over tokens"
    ends = robust_ends((*pre.values(), *fine.values()), diverging=False)
    return [
        Panel("Before fine-tuning", pre, unit, ends=ends),
        Panel("After fine-tuning", fine, unit, ends=ends),
        Panel("Change (after - before)", change, "change of R_h", diverging=True),
    ]


def _strength(result: ResultJson, path: Path) -> None:
    values = {(each["layer"], each["head"]): each["R_h"] for each in result["heads"]}
    unit = f"mean L2 norm of {result['of']} over tokens"
    heatmaps([Panel(f"Head strength, {Path(result['model']).name}", values, unit)], path)


def _comparison(result: ResultJson, path: Path) -> None:
    heatmaps(comparison_panels(*(_by_head(result[name]) for name in ("pre_tuned", "fine_tuned", "differences"))), path)


def _by_head(named: Mapping[str, float]) -> PerHead:
    """named: "layer:head" -> a number."""
    split = {name: name.partition(":") for name in named}
    return {(int(layer), int(head)): named[name] for name, (layer, _, head) in split.items()}


def _answers(result: ResultJson, path: Path) -> None:
    settings = result["settings"]
    what = [str(settings[name]) for name in ("mode", "site", "heads", "places") if settings.get(name)]
    title = f"{Path(settings['model']).name}: {' '.join(what)}, {len(result['samples'])} prompts"
    if "methods" in result:
        title += f"; p corrected for {result['methods']['comparisons']} metrics"
    before_and_after(result["summary"], result["units"], title, path)


def _ablated_benchmark(result: ResultJson, path: Path) -> None:
    """The change of each score, with its interval over questions where the file has one."""
    settings = result["settings"]
    rows = [
        {
            "task": f"{each['task']} {each['metric']}",
            "n": each["n"],
            "difference": each.get("difference") or {"mean": each["after"] - each["before"], "interval": None},
            "p_corrected": each.get("p_corrected"),
        }
        for each in result["benchmark"]
    ]
    two_runs(rows, [], f"{Path(settings['model']).name} without {settings['heads']} ({settings['mode']})", path)


def _recovered(result: ResultJson, path: Path) -> None:
    """Draws, for patching with pairs, which part of the logit difference the patched values brought back."""
    settings = result["settings"]
    title = (
        f"{Path(settings['model']).name}, {len(result['samples'])} pairs: {settings['site']} of {settings['places']}"
    )
    known = {name: part for name, part in result["summary"].items() if part["mean"] is not None}
    top_heads([(title, "part of the logit difference", known)], path)


def _screened(result: ResultJson, path: Path) -> None:
    """Heatmaps: a row for each score, on one scale of colours, and a column for each category."""
    panels = []
    for score, (name, unit, _) in _scores_of(result).items():
        ends = robust_ends(each[score][name] for each in result["scores"])
        for category, scores in _by_category(result).items():
            values = {place: each[score][name] for place, each in scores.items()}
            panels.append(Panel(f"{category}: {score}", values, unit, diverging=True, ends=ends))
    heatmaps(panels, path, columns=len(_by_category(result)))


_SCORES: dict[str, tuple[str, str, str]] = {
    "strength": ("d", "Cohen's d against neutral", "Change of strength"),
    "attention": ("mean", "attention above placebo words", "Attention to keywords"),
    "direct": ("mean", "logits, category - neutral", "Direct effect"),
}
"""Score -> which of its numbers is drawn, that number's unit, and a title."""
_FIRST_UNITS = {"attention": ("paid", "attention above uniform"), "direct": ("own", "logits")}
"""Score -> a number that files of the first versions lack, and the unit of what they hold in place of the difference."""


def _scores_of(result: ResultJson) -> dict[str, tuple[str, str, str]]:
    """`_SCORES`, with the units of a file's own version."""
    scores = dict(_SCORES)
    for score, (later, first_unit) in _FIRST_UNITS.items():
        name, _, title = scores[score]
        if later not in result["scores"][0][score]:
            scores[score] = (name, first_unit, title)
    return scores


def _by_category(result: ResultJson) -> dict[str, dict[tuple[int, int], Any]]:
    """Category -> (layer, head) -> the head's scores."""
    categories: dict[str, dict[tuple[int, int], Any]] = {}
    for scores in result["scores"]:
        categories.setdefault(scores["category"], {})[scores["layer"], scores["head"]] = scores
    return categories


def _screened_top(result: ResultJson, path: Path) -> None:
    panels = []
    for score, (name, unit, title) in _scores_of(result).items():
        changes, has_p = {}, False
        for scores in result["scores"]:
            numbers = scores[score]
            has_p = has_p or numbers.get("p") is not None
            star = _star(numbers)
            if numbers[name] is not None:
                head = f"{scores['layer']}:{scores['head']} {scores['category']}{star}"
                changes[head] = {"interval": None, **numbers, "mean": numbers[name]}
        note = f" (*: p < {SIGNIFICANT} in its category)" if has_p else ""
        panels.append((title + note, unit, changes))
    top_heads(panels, path)


def _swept(result: ResultJson, path: Path) -> None:
    """Heatmaps of a sweep: one for each measure, on one scale of colours."""
    means = _means(result)
    ends = robust_ends(value for _, _, values in means for value in values.values())
    panels = [Panel(title, values, unit, diverging=True, ends=ends) for title, unit, values in means]
    across = "Position, counted from the end" if "position" in result["places"][0] else "Head"
    heatmaps(panels, path, across=across)


def _means(result: ResultJson) -> list[tuple[str, str, PerHead]]:
    """For each measure: (title, unit, mean of each head)."""
    places, settings = result["places"], result["settings"]
    return [
        (
            f"{Path(settings['model']).name}: {name} ({settings['site']})",
            unit,
            {_place(each): each[name]["mean"] for each in places},
        )
        for name, unit in result["units"].items()
    ]


def _place(place: Mapping[str, Any]) -> tuple[int, int]:
    """(layer, head), or (layer, position)."""
    return place["layer"], place["head"] if "head" in place else place["position"]


def _swept_top(result: ResultJson, path: Path) -> None:
    panels = []
    for (title, unit, _), name in zip(_means(result), result["units"], strict=True):
        known = {_place(each): each[name] for each in result["places"] if each[name]["mean"] is not None}
        changes = {f"{layer}:{place}{_star(each)}": each for (layer, place), each in known.items()}
        note = f" (*: p < {SIGNIFICANT}, corrected for {len(changes)})" if any(map(_star, known.values())) else ""
        panels.append((title + note, unit, changes))
    top_heads(panels, path)


def _star(estimate: Mapping[str, Any]) -> str:
    """A star for an estimate whose p value is small, and whose 95 % interval, where it has one, leaves out 0."""
    p, interval = estimate.get("p"), estimate.get("interval")
    holds_0 = interval is not None and interval[0] <= 0 <= interval[1]
    return "*" if p is not None and p < SIGNIFICANT and not holds_0 else ""


def _two_runs(result: ResultJson, path: Path) -> None:
    names = [
        f"{result[each]['model']}{', edited' if result[each].get('edits') else ''} ({result[each]['path']})"
        for each in ("before", "after")
    ]
    two_runs(result["tasks"], result["sites"], " → ".join(names), path)


def _steered(result: ResultJson, path: Path) -> None:
    settings = result["settings"]
    title = f"{Path(settings['model']).name}, {settings['file']} added at {', '.join(settings['directions'])}"
    by_scale(result["benchmark"], result["texts"], result["units"], title, path)


_FIGURES: dict[str, dict[str, Callable[[ResultJson, Path], None]]] = {
    "strength": {"head_strength.png": _strength},
    "comparison": {"comparison_heatmap.png": _comparison},
    "screening": {"head_reaction_heatmap.png": _screened, "top_heads.png": _screened_top},
    "ablation": {"ablation_sentiment_comparison.png": _answers, "ablation_benchmark.png": _ablated_benchmark},
    "patching": {"patching_keyword_comparison.png": _answers},
    "pairs": {"patching_recovered.png": _recovered},
    "runs": {"runs_comparison.png": _two_runs},
    "steering": {"steering.png": _steered},
    "lens": {"lens.png": lens_figure},
    "lens_question": {"lens_question.png": question_figure},
    "tuned_lens": {"tuned_lens.png": tuned_figure},
    "geometry": {
        "geometry.png": shape_figure,
        "geometry_between.png": between_figure,
        "geometry_scatter.png": scatter_figure,
        "geometry_two_runs.png": two_runs_figure,
    },
    "experts": {"experts.png": experts_figure},
    "probe": {
        "probe.png": probe_figure,
        "probe_grid.png": grid_figure,
        "probe_transfer.png": transfer_figure,
        "probe_reliability.png": reliability_figure,
        "probe_risk_coverage.png": risk_coverage_figure,
    },
    "sweep": {"sweep_heatmap.png": _swept, "sweep_top_heads.png": _swept_top},
}
"""Kind -> file name of a figure -> the function that draws it, as SVG where the path that it gets ends in .svg."""
_PARTS = {
    "ablation_sentiment_comparison.png": "summary",
    "ablation_benchmark.png": "benchmark",
    "geometry_two_runs.png": "between_runs",
    "probe_grid.png": "grid",
    "probe_transfer.png": "transfer",
    "probe_reliability.png": "questions",
    "probe_risk_coverage.png": "questions",
}
"""File name of a figure -> the name in the result without which it is not drawn."""
