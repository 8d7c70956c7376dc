"""The page of a run, in a real browser without a network: what it shows, that it can be used by keyboard, and that prompts stay text."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.probed import run_of, run_of_tokens

from AutomaticEval import open_run, probe, run_report
from AutomaticEval.errors import StoreError
from AutomaticEval.pages.prompt_rows import prompt_rows
from AutomaticEval.pages.question_rows import question_rows
from AutomaticEval.pages.run_page import run_page
from AutomaticEval.report.page.charts import intervals_chart
from AutomaticEval.report.page.document import json_block

N = 60
HOSTILE = {
    3: "<script>document.title='stolen'</script><img src=x onerror=\"document.title='stolen'\">",
    4: "</script><script>document.title='stolen'</script><!--",
    5: "\u202eright to left\u202c \x1b[31m \x00 \u05d0\u05d1 'quotes' \"quotes\" & &amp;",
    6: "wide " * 200_000,
}


def a_run(folder: Path, *, flipped: int = 0) -> Any:
    source = np.random.default_rng(1)
    labels = source.integers(0, 2, N)
    labels[:flipped] = 1 - labels[:flipped]
    rows = {f"layer_{layer}": source.normal(size=(N, 8)).astype(np.float32) for layer in range(3)}
    rows["layer_1"][:, 0] += 4 * labels
    columns = [
        {"correct": bool(each), "doc_id": n, "task": f"task_{n % 2}", "target": "yes", "prediction": "<b>no</b>"}
        for n, each in enumerate(labels)
    ]
    words = [HOSTILE.get(n, f"what is the number {n} about") for n in range(N)]
    return run_of(folder, rows, columns, words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html of a run with a probe and a second run, made by the command."""
    folder = tmp_path_factory.mktemp("page")
    run = a_run(folder / "one")
    a_run(folder / "two", flipped=5)
    (folder / "results").mkdir()
    (folder / "results" / "probe.json").write_text(json.dumps(probe(run).as_json()))
    done = within("report", "one", "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "60 questions" in done.stdout
    return folder


@pytest.fixture(params=["light", "dark"])
def page(made: Path, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened from its file; at the end, nothing was said in the console, and nothing was asked of a network."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=request.param, offline=True)
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith("file:") else None)
    opened.goto((made / "report.html").as_uri())
    yield opened
    assert said == []
    context.close()


def shown(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#rows tr td:nth-child(2)").all_inner_texts()]


def test_search_filter_and_sort(page: Any) -> None:
    assert page.locator("#count").inner_text() == "60 questions"
    page.fill("#search", "number 42")
    assert shown(page) == ["what is the number 42 about"]
    page.fill("#search", "")
    page.select_option("#task", "task_1")
    assert page.locator("#count").inner_text() == "30 of 60 questions"
    page.select_option("#task", "")
    page.select_option("#change", "gained")
    n_gained = page.locator("#rows tr").count()
    page.select_option("#change", "lost")
    assert n_gained + page.locator("#rows tr").count() == 5
    page.select_option("#change", "")
    page.click("th[data-key=verdict] button")
    assert page.locator("#rows tr td:nth-child(4)").first.inner_text() == "right"
    page.click("th[data-key=verdict] button")
    assert page.locator("#rows tr td:nth-child(4)").first.inner_text() == "wrong"
    assert page.locator("th[data-key=verdict]").get_attribute("aria-sort") == "descending"
    assert page.locator("th[aria-sort]").count() == 1


def test_the_keyboard_alone_reaches_questions_and_layers(page: Any) -> None:
    page.locator("#rows button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "document 2" in page.locator("#chosen h3").inner_text()
    assert page.locator("#rows tr[aria-selected=true]").count() == 1
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    assert page.locator("#place").inner_text() == "layer_0"
    page.keyboard.press("ArrowRight")
    assert page.locator("#slider").get_attribute("aria-valuetext") == "layer_1"


def test_norms_are_those_of_the_stored_rows(page: Any, made: Path) -> None:
    page.fill("#search", "number 42")
    page.locator("#rows button").first.click()
    for at, key in enumerate(("layer_0", "layer_1", "layer_2")):
        page.locator("#slider").fill(str(at))
        titles = [each.get_attribute("title") for each in page.locator(".tokens span").all()]
        rows = open_run(made / "one").where(doc_id=42)[0]["activations"][key].double().norm(dim=1)
        told = [float(re.search(r"norm (\S+)$", str(title))[1]) for title in titles]  # type: ignore[index]
        np.testing.assert_allclose(told, rows[: len(told)], rtol=0.006)  # three digits


def test_hostile_prompts_stay_text(page: Any) -> None:
    page.fill("#search", "stolen")
    for button in page.locator("#rows button").all():
        button.click()
        assert "stolen" in page.locator("#chosen pre").first.inner_text()
    assert page.title() == "one"
    assert page.locator("img, #chosen script, #rows script").count() == 0
    page.fill("#search", "quotes")
    page.locator("#rows button").first.click()
    text = page.locator("#chosen pre").first.inner_text()
    assert "\\u202e" in text
    assert "\\x1b[31m" in text
    assert "&amp;" in text


def test_what_was_found_is_on_the_page(page: Any, made: Path) -> None:
    result = json.loads((made / "results" / "probe.json").read_text())
    text = page.locator("#probe").inner_text()
    assert f"{result['best']['judged']['auroc']['mean']:.3f}" in text
    for each in result["findings"]:
        assert each["text"] in text
    assert "python main.py lens" in page.locator("#lens").inner_text()
    assert page.locator("#probe svg:visible").count() == 2


def luminance(colour: str) -> float:
    channels = [float(each) / 255 for each in re.findall(r"[\d.]+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_of_aa(page: Any) -> None:
    pairs = page.evaluate(
        """() => [...document.querySelectorAll('p, td, th, h1, h2, h3, h4, a, button, label, dt, dd, summary, code, pre, .tag')].map(element => {
            let behind = element;
            while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind || document.body).backgroundColor, element.tagName];
        })"""
    )
    for colour, behind, tag in {tuple(each) for each in pairs}:
        one, other = sorted((luminance(colour), luminance(behind)))
        assert (other + 0.05) / (one + 0.05) >= 4.5, (tag, colour, behind)


def test_a_phone_needs_no_sideways_scrolling(made: Path, browser: Any) -> None:
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    opened.goto((made / "report.html").as_uri())
    for button in opened.locator("#rows button").all()[3:7]:
        button.click()
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    opened.close()


def test_no_text_ends_the_block_of_data() -> None:
    text = json_block({"text": "</script><!--&"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"text": "</script><!--&"}


def test_a_chart_takes_names_with_any_separator() -> None:
    """Vega sorts names in an expression, where U+2028 and U+2029 would end a string."""
    marks = "\u2028\u2029\n\"'\\"
    rows = [{"name": f"a{mark}b", "mean": 0.5, "low": None, "high": None, "said": ""} for mark in marks]
    drawn = intervals_chart("", "", rows, "share").svg["wide"]
    assert all(f"a{name}b" in drawn for name in (r"\u2028", r"\u2029"))


def test_results_of_another_run_are_left_out_and_named(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"kind": "probe", "run": {"path": "other", "model": "m"}}))
    text = run_page(open_run(made / "one"), results=[file])
    assert "is of the run other of m" in text
    assert "python main.py lens one<" in text
    damaged = tmp_path / "lens.json"
    damaged.write_text("{")
    text = run_page(open_run(made / "one"), results=[tmp_path])
    assert "lens.json cannot be read" in text
    for folder in (made, tmp_path):  # no page tells of the machine that made it
        assert str(folder) not in text
    assert "python main.py probe" in text


def test_what_cannot_be_written_is_refused_in_one_line(made: Path) -> None:
    for options, said in (
        (("-o", "page.pdf"), "is no .html file"),
        (("-o", "report.html"), "exists and is not overwritten"),
        (("--results", "nowhere", "-o", "n.html"), "no result file or folder nowhere"),
    ):
        done = within("report", "one", *options, cwd=made)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
    assert not (made / "n.html").exists()


@pytest.mark.parametrize("numbers", [{}, {"confidence": 0.5, "margin": 12.125}])
def test_no_column_runs_under_the_chosen_question(
    numbers: dict[str, float], browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one column of numbers and with three, as a run of choices and of generated answers has. The question's column is the widest."""

    def with_numbers(*given: Any) -> dict[str, Any]:
        made = question_rows(*given)
        return {**made, "rows": [{**each, **numbers} for each in made["rows"]]}

    monkeypatch.setattr("AutomaticEval.pages.run_page.question_rows", with_numbers)
    file = tmp_path / "page.html"
    run = open_run(Path(__file__).parent / "data" / "format-1.5" / "run")
    file.write_text(run_page(run, run))
    opened = browser.new_page()
    opened.goto(file.as_uri())
    for width in (1600, 1440, 1280, 1101, 1000, 641, 390):
        opened.set_viewport_size({"width": width, "height": 900})
        boxes = opened.locator("#table th:visible").evaluate_all("all => all.map(each => each.offsetWidth)")
        assert boxes[1] == max(boxes), (width, boxes)
        table, chosen = opened.locator("#table").bounding_box(), opened.locator("#chosen").bounding_box()
        assert table["x"] + table["width"] <= min(width, chosen["x"]) or table["y"] + table["height"] <= chosen["y"]
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()


def test_each_probe_is_shown_with_its_target_and_that_of_verdicts_first(made: Path, tmp_path: Path) -> None:
    result = json.loads((made / "results" / "probe.json").read_text())
    for number, target in enumerate(("correct", "task", "task")):
        (tmp_path / str(number)).mkdir()
        file = tmp_path / str(number) / "probe.json"
        file.write_text(json.dumps({**result, "classes": {**result["classes"], "target": target}}))
        os.utime(file, (time.time() + number,) * 2)
    options = [part for number in range(3) for part in ("--results", str(tmp_path / str(number)))]
    page = tmp_path / "page.html"
    done = within("report", "one", *options, "-o", str(page), cwd=made)
    assert done.returncode == 0, done.stderr
    headings = re.findall(r'<h3 class="part">Target <bdi>(\w+)', page.read_text())
    assert headings == ["correct", "task"]
    left_out = "1/probe.json is older than 2/probe.json, and of the same target and position."
    assert f"Left out:    {left_out}" in done.stdout
    assert left_out in page.read_text()


@pytest.mark.parametrize("width", [1280, 390])
def test_no_label_of_a_chart_is_cut_or_meets_another(width: int, browser: Any, tmp_path: Path) -> None:
    names = [
        "mean log-probability of the answer's tokens",
        "the same model with random weights",
        "a_" * 40,
        "W" * 70,
        "W" * 150,
        "W" * 151,
    ]
    rows = [{"name": name, "mean": 0.5, "low": 0.4, "high": 0.6, "said": name} for name in names]
    drawn = intervals_chart("title", "told", rows, "share").svg["wide" if width > 640 else "narrow"]
    opened = browser.new_page(viewport={"width": width, "height": 900})
    style = resources.files("AutomaticEval.report.page").joinpath("page.css").read_text()
    opened.set_content(f"<style>{style}</style><main><figure>{drawn}</figure></main>")
    found = (
        "all => all.map(each => each.getBoundingClientRect()).map(box => [box.left, box.right, box.top, box.bottom])"
    )
    boxes = opened.locator("svg text").evaluate_all(found)
    assert len(boxes) > 6
    assert min(box[0] for box in boxes) >= 0
    assert max(box[1] for box in boxes) <= width
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] + 1 or other[3] <= one[2] + 1
    text = " ".join(opened.locator("svg text").all_text_contents()).replace(" ", "")
    assert names[0].replace(" ", "") in text
    heights = opened.locator("svg [aria-roledescription=point]").evaluate_all(found)
    assert len({box[2] for box in heights}) == len(names)
    opened.close()


def test_tokens_have_signs_for_blanks_and_ends_of_lines(tmp_path: Path) -> None:
    tokens = [(["ĠWhat", "Ċ", "▁is", "?"], ["Ġit", "."])]
    run = run_of_tokens(tmp_path / "run", tokens, {"layer_0": [np.ones((5, 4))]}, [{"correct": True}])
    held = prompt_rows(run.questions(), [0], ["layer_0"])[0]
    assert held["tokens"] == ["␣What", "⏎", "␣is", "?"]


def test_tasks_that_the_other_run_lacks_stay_in_the_scores(made: Path, browser: Any, tmp_path: Path) -> None:
    run, file = open_run(made / "one"), tmp_path / "page.html"
    file.write_text(run_page(run, run.where(task="task_1")))
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.goto(file.as_uri())
    lines = [each.split("\t") for each in opened.locator("#scores tbody tr").all_inner_texts()]
    assert [line[0] for line in lines] == ["task_1", "task_0"]
    verdicts = [each.correct for each in run.questions() if each.task == "task_0"]
    assert lines[1][2].startswith(f"{np.mean(verdicts):.3f} [")
    assert (lines[1][3], lines[1][6]) == ("", "30")
    ticks = opened.locator("#scores .wide .role-axis-label text").all_text_contents()
    numbers = [float(each.replace("−", "-")) for each in ticks if re.fullmatch(r"[−\d.]+", each)]
    assert numbers == [-each for each in reversed(numbers)]
    opened.close()


def test_a_path_is_a_run_and_one_result(made: Path) -> None:
    by_path = run_report(str(made / "one"), made / "two", results=str(made / "results" / "probe.json")).html
    opened = run_report(open_run(made / "one"), open_run(made / "two"), results=[made / "results"]).html
    written = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.sub(written, "", by_path) == re.sub(written, "", opened)
    with pytest.raises(StoreError, match="no result file or folder nowhere"):
        run_report(made / "one", results="nowhere")
