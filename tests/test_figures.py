"""Figures of numbers that are easily drawn wrong: intervals without length, extreme cells, and results that hold only a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from AutomaticEval.analysis.numbers.estimate import effects, mean_interval
from AutomaticEval.analysis.result import Result
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.report.bars import ends_of, whisker
from AutomaticEval.report.figures import draw, save_with_figures
from AutomaticEval.report.heatmap import robust_ends
from AutomaticEval.report.layers import geometry_figures
from AutomaticEval.report.probes import by_question, transfer
from AutomaticEval.store.disk.json_files import read_json


@pytest.mark.parametrize("n", [2, 7, 54])
def test_a_metric_that_is_one_number_in_all_prompts_is_drawn(n: int, tmp_path: Path) -> None:
    change = effects(np.zeros((n, 1)))[0]
    summary = {"score": {"before": mean_interval([0.7] * n), "after": mean_interval([0.7] * n), "change": change}}
    samples = [{"prompt": "p"}] * n
    result = Result("ablation", {"units": {}, "samples": samples, "summary": summary}, {"model": "demo"})
    written = save_with_figures(tmp_path / "ablation.json", result.as_json())
    assert [file.name for file in written] == ["ablation.json", "ablation_sentiment_comparison.png"]


def test_an_old_file_whose_interval_rounding_put_beside_its_mean_is_drawn(tmp_path: Path) -> None:
    beside: dict[str, Any] = {"mean": 0.7, "interval": [0.7000000000000001, 0.7000000000000001], "n": 7}
    summary = {"score": dict.fromkeys(("before", "after", "change"), beside)}
    result = {"kind": "ablation", "settings": {"model": "demo"}, "samples": [], "units": {}, "summary": summary}
    assert len(draw(result, tmp_path)) == 1
    assert ends_of(beside) == (0.7, 0.7000000000000001)


def test_an_interval_without_length_is_a_point_none_is_nothing_and_the_widest_is_drawn() -> None:
    axes = Figure().add_subplot()
    for place, estimate in enumerate(
        (
            {"mean": 1.0, "interval": [1.0, 1.0]},
            {"mean": 1.0, "interval": None},
            {"mean": 1.0, "interval": [0.5, 1.5]},
            {"mean": 1.0, "interval": [0.5, 1.5], "simultaneous": [0.0, 3.0]},
        )
    ):
        whisker(axes, place, estimate)
    assert [list(line.get_xdata()) for line in axes.lines] == [[1.0], [0.5, 1.5], [0.0, 3.0]]


def test_the_same_result_gives_the_same_svg_with_the_figure_of_the_png(tmp_path: Path) -> None:
    change = {"mean": 0.2, "interval": [0.1, 0.3], "n": 7}
    summary = {"a & <b> $x": {"before": change, "after": change, "change": change}}
    result = {"kind": "ablation", "settings": {"model": "demo"}, "samples": [], "units": {}, "summary": summary}
    (first,), (second,) = (draw(result, tmp_path / name, "svg") for name in ("a", "b"))
    assert first.name == "ablation_sentiment_comparison.svg"
    assert first.read_bytes() == second.read_bytes()
    root = ElementTree.fromstring(first.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("a & <b> $x") == 2  # the panel's title and unit, as text
    assert "a &amp; &lt;b&gt; $x" in first.read_text()
    assert all("sans-serif" in each.attrib["style"] for each in root.iter("{http://www.w3.org/2000/svg}text"))
    (png,) = draw(result, tmp_path / "a")
    with Image.open(png) as image:
        width = float(root.attrib["width"].removesuffix("pt"))
        assert image.width / 150 == pytest.approx(width / 72, rel=0.01)
    with pytest.raises(SelectionError, match="png, svg"):
        draw(result, tmp_path / "a", "pdf")


def test_an_extreme_cell_does_not_set_the_colours() -> None:
    usual = np.random.default_rng(0).normal(0, 0.3, 143)
    low, high = robust_ends([*usual, -17.9, None, float("nan")])
    assert -2 < low < usual.min()
    assert high == usual.max()
    assert robust_ends(usual) == (usual.min(), usual.max())
    low, high = robust_ends([10.0, 10.5, 11.0, 10.2, 400.0], diverging=False)
    assert (low, high) == (10.0, pytest.approx(10.5 + 3 * 0.5))
    assert robust_ends([0.0] * 30 + [2.0]) == (0.0, 2.0)
    assert robust_ends([None]) is None


def test_a_folder_in_the_place_of_a_result_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder; give a result file"):
        read_json(tmp_path)


def test_bins_are_joined_where_they_have_questions_enough_and_marks_grow_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(by_question, "save", lambda figure, *_: drawn.append(figure))
    probability = [0.05] * 50 + [0.45] * 2 + [0.95] * 20
    result = {
        "classes": {"target": "t", "positive": "p", "negative": "n"},
        "run": {"model": "demo"},
        "settings": {"position": "prompt[-1]"},
        "best": {"site": "layer_0", "places": {"layer_0": 5}},
        "questions": {"label": [0, 1] * 36, "probability": probability, "confidence": [None] * 72},
    }
    by_question.reliability_figure(result, tmp_path / "f.png")
    above = drawn[0].axes[0]
    np.testing.assert_allclose(above.lines[1].get_xdata(), [0.05, 0.95])
    areas = above.collections[0].get_sizes()
    assert areas[0] > areas[-1] > areas[4]
    assert "5 questions or more" in above.get_legend().get_title().get_text()


def test_cells_of_the_transfer_below_chance_have_their_own_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(transfer, "save", lambda figure, *_: drawn.append(figure))
    values = (0.1, 0.4, 0.5, 0.9)
    cells = [
        {"train": n // 2, "test": n % 2, "auroc": {"mean": each, "interval": None}} for n, each in enumerate(values)
    ]
    settings = {"position": "prompt[-1]"}
    of_runs = {"runs": [{"path": "a"}, {"path": "b"}], "cells": cells}
    transfer.transfer_figure(
        {"transfer": of_runs, "settings": settings, "classes": {"target": "t"}}, tmp_path / "f.png"
    )
    (image,) = drawn[0].axes[0].images
    colours = [image.to_rgba(each) for each in values]
    assert len(set(colours)) == 4
    assert min(colours[2][:3]) > 0.9  # chance is white
    assert colours[0][2] > colours[0][0]  # blue
    assert colours[3][0] > colours[3][2]  # red


def test_geometry_of_few_places_names_each_line_and_one_position_is_drawn_as_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(geometry_figures, "save", lambda figure, *_: drawn.append(figure))
    norm = {"mean": 2.0, "interval": None}
    shape = {"norm": norm, "explained": [0.5, 0.2], "effective_rank": 2.0, "participation_ratio": 2.0}
    about = {"random_effective_rank": 3.0, "n": 3}
    places = [{"site": f"layer_{layer}", **shape, **about} for layer in range(4)]
    one = {"positions": [-1], "means": [[1.0], [2.0], [None], [4.0]]}
    result = {
        "places": places,
        "run": {"model": "demo", "path": "r"},
        "settings": {"position": "prompt[-1]"},
        "n_questions": 3,
        "norms_by_position": {"from_start": {"positions": [], "means": []}, "from_end": one},
    }
    geometry_figures.shape_figure(result, tmp_path / "f.png")
    _, _, explained, position = drawn[0].axes
    assert [each.get_text() for each in explained.get_legend().get_texts()] == [each["site"] for each in places]
    assert (len(position.images), list(position.lines[0].get_ydata())) == (0, [1.0, 2.0, 4.0])
