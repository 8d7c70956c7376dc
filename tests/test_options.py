"""Options are the fields of dataclasses: each has one name, one help, and the same meaning in every command and function."""

from __future__ import annotations

import re
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from AutomaticEval import __version__, evaluate_with_activations, generate_inference_with_activations
from AutomaticEval.capture.prompt import AskOptions
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli.app import app
from AutomaticEval.cli.options import OLD_SPELLINGS, PANELS, SPELLINGS, command, options_of, takes
from AutomaticEval.errors import PathExists, SelectionError, UnknownLayer
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.evaluating import CaptureKeywords
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.loading import DEMO_FOLDER
from AutomaticEval.options import Option, options_in
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.partial_folders import hidden_name
from AutomaticEval.store.reader import open_run


def commands(group: Any = None, name: str = "") -> dict[str, Any]:
    group = group or typer.main.get_command(app)
    own = {name or "benchmark": group} if not name or not hasattr(group, "commands") else {}
    for part, each in getattr(group, "commands", {}).items():
        own |= commands(each, f"{name} {part}".strip())
    return own


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@dataclass(frozen=True)
class Cooking:
    """Any dataclass will do."""

    minutes: Annotated[int, Option("How long.", minimum=1)]
    salt: Annotated[bool, Option("With salt.")] = False
    seed: Annotated[int, Option("Seed.")] = 7
    own: int = 3


def cook() -> tuple[typer.Typer, list[Any]]:
    """A command that takes a dataclass, and what it was called with."""
    calls: list[Any] = []
    kitchen = typer.Typer(context_settings=SPELLINGS)

    @kitchen.command()
    @command
    @takes(cooking=options_of(Cooking, seed=8), sampling=options_of(Sampling, "seed"))
    def serve(
        cooking: Cooking | None, sampling: Sampling, dish: Annotated[str, typer.Option("--dish")] = "soup"
    ) -> None:
        calls.append((dish, cooking, sampling.seed))

    return kitchen, calls


def test_a_command_gets_the_dataclass_made_of_its_options() -> None:
    kitchen, calls = cook()
    assert CliRunner().invoke(kitchen, ["--minutes", "5", "--salt", "--dish", "rice"]).exit_code == 0
    assert calls == [("rice", Cooking(5, True, 8), 8)]  # the command's own default; shared by both dataclasses


def test_a_dataclass_that_lacks_what_it_needs_is_not_made() -> None:
    kitchen, calls = cook()
    assert CliRunner().invoke(kitchen, []).exit_code == 0
    assert calls == [("soup", None, 8)]


def test_a_field_without_an_option_is_none() -> None:
    assert list(options_in(Cooking)) == ["minutes", "salt", "seed"]
    kitchen, calls = cook()
    assert CliRunner().invoke(kitchen, ["--own", "4"]).exit_code == 2
    assert calls == []


@pytest.mark.parametrize("kind", [LoadOptions, Sampling, Selection, Benchmark, RunOutput])
def test_every_option_of_the_benchmark_and_of_generate_stands_in_its_group(kind: type) -> None:
    offered = {each.name: each for each in [*commands()["benchmark"].params, *commands()["generate"].params]}
    for name, option in options_in(kind).items():
        assert offered[name].help, name
        assert offered[name].rich_help_panel in PANELS, name
        assert option.option.help[0].isupper() or option.option.help.split()[0].rstrip(":") in (
            "auto", "tree", "lm-eval", "all", '"auto"', "result",
        ), f"{name}: {option.option.help}"  # fmt: skip


def test_keywords_of_the_functions_are_the_options_of_the_dataclasses() -> None:
    """The typed dicts are for editors and type checkers: they say what the dataclasses say."""
    asked = typing.get_type_hints(AskOptions)
    fields = {**typing.get_type_hints(LoadOptions), **typing.get_type_hints(Sampling)}
    for name in [*options_in(LoadOptions), *options_in(Sampling)]:
        assert asked[name] == fields[name], name
    assert typing.get_type_hints(LoadKeywords).items() <= asked.items()
    evaluate = set(typing.get_type_hints(CaptureKeywords))
    assert set(options_in(Benchmark)) - {"benchmark"} <= evaluate
    assert set(options_in(LoadOptions)) | set(options_in(RunOutput)) <= evaluate
    assert set(options_in(Selection)) - {"layers"} <= evaluate  # in functions: layers_to_capture


def test_what_is_written_is_named_by_output_everywhere() -> None:
    writes = {name for name, each in commands().items() if "--output" in [o for p in each.params for o in p.opts]}
    assert writes >= {
        "benchmark", "generate", "extract", "merge", "prune", "export", "heads strength", "heads compare", "heads ablate",
        "heads patch", "heads sweep", "heads screen", "heads plot", "plot", "steer",
    }  # fmt: skip
    for name in writes:
        (output,) = (each for each in commands()[name].params if "--output" in each.opts)
        assert "-o" in output.opts, name


def test_no_help_shows_an_older_spelling_and_every_command_reads_it() -> None:
    shown = {option for each in commands().values() for param in each.params for option in param.opts}
    for old, new in OLD_SPELLINGS.items():
        assert f"--{old}" not in shown
        assert f"--{new}" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "Hi", "--save_path", "x.txt/y.h5", "--layers", "99"], "no layer 99"),
        (["heads", "strength", "--data_path", "none.jsonl", "--output_dir", "r", "--sample_num", "3"], "none.jsonl"),
        (["heads", "ablate", "--head-spec", "0:0", "--emotion", "joy", "--max-tokens", "3"], "add --profile"),
        (["extract", "--texts", "none.jsonl", "--num_samples", "3", "--model", "demo"], "none.jsonl"),
    ],
)
def test_older_spellings_are_read(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ask(*arguments)
    assert "No such option" not in done.output
    assert told in done.output, done.output


def test_the_version_is_told() -> None:
    assert ask("--version").output == f"AutomaticEval {__version__}\n"
    assert ask("-h").exit_code == 0
    assert "would be ignored" in ask("--version", "sites").output


def test_help_has_its_groups_in_order() -> None:
    told = ask("--help").output
    places = [told.index(panel) for panel in PANELS]
    assert places == sorted(places)
    assert re.search(r"-o\b", told)
    assert told.index("--benchmark ") < told.index("--drop_experts") < told.index(PANELS[1]), "of few models: last"


def test_a_run_goes_into_the_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    done = ask("--capture_activations", "--limit", "2", "-o", "there")
    assert done.exit_code == 2
    assert PathExists.__name__ in done.output
    done = ask("--capture_activations", "--limit", "2", "--layers", "0", "-o", "deep/mine")
    assert done.exit_code == 0, done.output
    assert len(open_run(tmp_path / "deep" / "mine")) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "there"]
    for name in (
        ".lock",
        "asked.json",
        hidden_name("shard-00000.h5"),
    ):  # of a process that was killed before its first shard
        (tmp_path / "deep" / "killed").mkdir(exist_ok=True)
        (tmp_path / "deep" / "killed" / name).write_text("{}")
    done = ask("--capture_activations", "--limit", "1", "--layers", "0", "-o", "deep/killed")
    assert done.exit_code == 0, done.output
    assert open_run(tmp_path / "deep" / "killed").finished


def test_without_capture_the_named_folder_gets_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ask("--limit", "2", "--output", "scores")
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "scores").rglob("results_*.json"))


def test_a_run_is_not_resumed_into_another_folder(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="resume goes on in its own folder"):
        RunOutput(output=tmp_path / "a", resume=tmp_path)


def test_a_category_needs_a_profile() -> None:
    done = ask("extract", "--texts", "x.jsonl", "--category", "joy", "--model", "demo")
    assert SelectionError.__name__ in done.output
    assert "--profile" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sites", "bogus"], "--sites was given, but nothing is captured"),
        (["--resume", "/nonexistent"], "/nonexistent is no folder"),
        (["--limit", "0", "show", "x"], "--limit before the command 'show'"),
        (["generate", "hi", "--positions", "bogus"], "--positions was given, but nothing is captured"),
        (["--capture_activations", "-o", "a", "--activation_save_dir", "b"], "--output names the run's own folder"),
        (["-o", "a", "--output_path", "b"], "--output names the folder for lm-eval's results"),
        (["extract", "--texts", "x.jsonl", "--model", "demo", "--split", "test"], "it is of a --dataset"),
    ],
)
def test_what_would_be_ignored_is_refused_before_it_is_looked_at(arguments: list[str], told: str) -> None:
    done = ask(*arguments)
    assert (done.exit_code, told in done.output) == (2, True), done.output


def test_lm_evals_results_may_be_in_the_runs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--capture_activations", "--limit", "2", "--layers", "0")
    for own, results in (("run", "run"), ("other", "other/results")):
        done = ask(*asked, "-o", own, "--output_path", results)
        assert done.exit_code == 0, done.output
        assert len(open_run(tmp_path / own)) > 0
        assert list((tmp_path / results).rglob("results_*.json"))


def test_an_output_that_exists_is_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    for place in (tmp_path / "there", "~/there"):
        with pytest.raises(PathExists):
            evaluate_with_activations("no-such-model", "demo", output=place)
    with pytest.raises(SelectionError, match="no compression"):
        evaluate_with_activations("no-such-model", "demo", compression="rar")


def test_the_norms_of_heads_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--capture_activations", "--head_strength", "--sites", "embed,head_result_norm", "--limit", "2")
    assert ask(*asked, "-o", "run").exit_code == 0
    assert open_run(tmp_path / "run").settings["sites"] == "embed,head_result_norm"


def test_single_sites_that_a_model_lacks_are_refused_before_its_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(DEMO_FOLDER / "config.json", tmp_path)  # a model without weights
    with pytest.raises(UnknownLayer):
        generate_inference_with_activations("hi", str(tmp_path), sites="layer_99.mlp_out")
