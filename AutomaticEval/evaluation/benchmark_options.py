"""Which questions of which benchmarks are asked, and how: the options of a benchmark run. Imports no heavy library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from AutomaticEval.capture.sampling import Generation, wrong_generation
from AutomaticEval.errors import BenchmarkError
from AutomaticEval.options import Option
from AutomaticEval.public_names import public_name

SCORINGS = ("tree", "stock")
WHY_NOT = {
    "use_cache": "answers that come from lm-eval's cache have no forward, and so no activations; leave it out. A run that was "
    "cut short goes on with --resume.",
    "cache_requests": "lm-eval keeps requests under a key that leaves out the task's settings and the questions drawn, and so "
    "may ask the wrong ones; leave it out.",
    "tp_plan": "the processes of a benchmark share its questions, and so cannot share a model; spread the model over the GPUs of each with device_map.",
}
"""Option -> why it is not served. Those of lm-eval's caches would break the link between a request and its forward."""


LATER = ("think_end_token", "enable_thinking")
"""Options that are written into the settings of runs only where they are given."""


@dataclass(frozen=True)
class Benchmark:
    """Which questions are asked, and how."""

    names: Annotated[
        tuple[str, ...],
        Option("lm-eval tasks or groups, comma-separated, or the bundled demo.", name="benchmark", reads=str),
    ]
    num_trials: Annotated[int | None, Option("So many questions, drawn at random over the whole benchmark.")] = None
    limit: Annotated[float | None, Option("The first so many documents of each task; below 1: that share of them.")] = (
        None
    )
    num_fewshot: Annotated[int | None, Option("Examples before each question. Default: the task's own number.")] = None
    seed: Annotated[
        int | None,
        Option(
            "Seed for drawing questions and for lm-eval's random numbers. Default: 0 for drawing, and lm-eval's own seeds."
        ),
    ] = None
    batch_size: Annotated[
        int | str,
        Option(
            "Rows in a forward of --scoring stock and of generated answers: a number, or auto.", reads=str, default="8"
        ),
    ] = 8
    scoring: Annotated[
        str, Option("tree: shared prefixes are computed once; stock: in lm-eval's own batches, to the last bit.")
    ] = "tree"
    generation: Generation = "auto"
    include_path: Annotated[
        tuple[str, ...],
        Option(
            "Folder with task YAML files of your own. Their code (!function) runs when such a task is asked for.",
            reads=list[Path] | None,
            default=None,
            metavar="FOLDER",
        ),
    ] = ()
    local_files: Annotated[
        str | None,
        Option("Folder with the tasks' data; no network is needed.", name="benchmark_data", reads=Path | None),
    ] = None
    apply_chat_template: Annotated[bool | str, Option("Use the tokenizer's own chat template.", reads=bool)] = False
    """True: the tokenizer's own; a name: that one of several."""

    system_instruction: Annotated[str | None, Option("Text that each prompt begins with.")] = None
    gen_kwargs: Annotated[
        str | dict[str, Any] | None,
        Option("How answers are generated, such as do_sample=true,temperature=0.7,max_gen_toks=64.", reads=str | None),
    ] = None
    """A text or a dict, as lm-eval takes them."""

    repeats: Annotated[
        int | None, Option("How often each question is answered, by sampling. Default: the task's own number.")
    ] = None
    think_end_token: Annotated[
        str | int | None,
        Option(
            "What the model's thinking ends with, such as </think>, or the id of that token: lm-eval scores what follows it.",
            reads=str | None,
        ),
    ] = None
    enable_thinking: Annotated[
        bool | None,
        Option(
            "Tell the chat template that the model is to think, or not to: true or false.",
            reads=str | None,
            metavar="true|false",
        ),
    ] = None
    predict_only: Annotated[bool, Option("Generate answers, and compute no scores.")] = False
    confirm_run_unsafe_code: Annotated[bool, Option("Run tasks that execute code which the model wrote.")] = False

    @classmethod
    def parse(
        cls,
        benchmark: str | Iterable[str],
        include_path: str | Path | Iterable[str | Path] | None = None,
        benchmark_data: str | Path | None = None,
        batch_size: int | str = 8,
        enable_thinking: bool | str | None = None,
        **given: Any,
    ) -> Benchmark:
        """A benchmark from what people type: "mmlu,gsm8k" or a list of names, one folder or several."""
        names = benchmark.split(",") if isinstance(benchmark, str) else benchmark
        folders = [include_path] if isinstance(include_path, str | Path) else include_path or ()
        return cls(
            tuple(name.strip() for name in names if name.strip()),
            include_path=tuple(map(str, folders)),
            local_files=None if benchmark_data is None else str(benchmark_data),
            batch_size=int(batch_size) if str(batch_size).isdecimal() else batch_size,
            enable_thinking=_yes_or_no(enable_thinking),
            **given,
        )

    def __post_init__(self) -> None:
        if self.num_trials is not None and self.limit is not None:
            raise BenchmarkError("--num_trials and --limit were both given; choose one.")
        if self.num_trials is not None and self.num_trials < 1:
            raise BenchmarkError(f"--num_trials is {self.num_trials}; at least 1 is needed.")
        if self.limit is not None and not (isinstance(self.limit, int | float) and self.limit > 0):
            raise BenchmarkError(f"limit is {self.limit!r}; it must be a number above 0.")
        for folder in self.include_path:
            if not Path(folder).is_dir():
                raise BenchmarkError(
                    f"--include_path {folder} is no folder; give the folder that holds your YAML files."
                )
        if self.local_files is not None and not Path(self.local_files).is_dir():
            raise BenchmarkError(
                f"--benchmark_data {self.local_files} is no folder; give the folder that holds the files."
            )
        if self.repeats is not None and self.repeats < 1:
            raise BenchmarkError(f"--repeats is {self.repeats}; at least 1 is needed.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise BenchmarkError(f"--num_fewshot is {self.num_fewshot}; at least 0 is needed.")
        check_scoring(self.scoring)
        check_generation(self.generation, self.scoring)
        self._check_thinking()
        if not self.names:
            raise BenchmarkError("no benchmark was named; write for example demo or mmlu,gsm8k.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise BenchmarkError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1}.")
        if not (self.batch_size == "auto" or (str(self.batch_size).isdecimal() and int(self.batch_size) > 0)):
            raise BenchmarkError(f"--batch_size is {self.batch_size!r}; write a number or auto.")

    def _check_thinking(self) -> None:
        if self.think_end_token is not None and not str(self.think_end_token).strip():
            raise BenchmarkError("--think_end_token is empty; write what the thinking ends with, such as </think>.")
        if self.enable_thinking and self.think_end_token is None:
            raise BenchmarkError(
                "--enable_thinking true needs --think_end_token, such as </think>: without it lm-eval would score the thinking, too."
            )
        if self.enable_thinking is not None and not self.apply_chat_template:
            raise BenchmarkError(
                "--enable_thinking is told to the chat template, and none is used; add --apply_chat_template."
            )

    @property
    def of_thinking(self) -> dict[str, Any]:
        """The options of lm-eval's `hf` that say how a model thinks, as far as they are given."""
        given = {"think_end_token": self.think_end_token, "enable_thinking": self.enable_thinking}
        return {name: value for name, value in given.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """The fields, for the settings of runs: folders and YAML files are told by their names, not by their paths.

        How answers are generated is not among them: what the model was served with, and not what was asked for, is a setting of its own.
        """
        named = {name: [public_name(each) for each in getattr(self, name)] for name in ("names", "include_path")}
        fields = {name: value for name, value in asdict(self).items() if name != "generation"}
        fields = {name: value for name, value in fields.items() if value is not None or name not in LATER}
        return {**fields, **named, "local_files": self.local_files and public_name(self.local_files)}


def _yes_or_no(given: bool | str | None) -> bool | None:
    if given is None or isinstance(given, bool):
        return given
    if given.lower() not in ("true", "false"):
        raise BenchmarkError(f"--enable_thinking is {given!r}; write true or false.")
    return given.lower() == "true"


def check_scoring(scoring: str) -> None:
    """Raises BenchmarkError for a way to score that does not exist."""
    if scoring not in SCORINGS:
        raise BenchmarkError(f"--scoring is {scoring!r}; write {' or '.join(SCORINGS)}.")


def check_generation(generation: str, scoring: str) -> None:
    """Raises BenchmarkError for a way to generate that does not exist, or that does not go with the scoring."""
    wrong = wrong_generation(generation)
    if wrong is not None:
        raise BenchmarkError(wrong)
    if generation == "graph" and scoring == "stock":
        raise BenchmarkError(
            "--generation graph was given, but --scoring stock computes answers as lm-eval does, to the last bit; leave one out."
        )


class BenchmarkKeywords(TypedDict, total=False):
    """The options of `Benchmark` as keywords of functions, for editors and type checkers; a test compares the two."""

    num_trials: int | None
    """How many questions are drawn over the whole benchmark."""
    limit: float | None
    num_fewshot: int | None
    seed: int | None
    batch_size: int | str
    scoring: str
    """tree scores over the prefix tree of all requests, stock in lm-eval's own batches."""
    generation: str
    """graph, eager or auto: how the decode steps of generated answers are run."""
    include_path: str | Path | Iterable[str | Path]
    benchmark_data: str | Path | None
    """A folder with the tasks' data."""
    apply_chat_template: bool | str
    system_instruction: str | None
    gen_kwargs: str | dict[str, Any] | None
    repeats: int | None
    think_end_token: str | int | None
    """What the thinking ends with, a text or a token's id: lm-eval scores what follows it."""
    enable_thinking: bool | None
    """What the chat template is told: whether the model is to think."""
    predict_only: bool
    confirm_run_unsafe_code: bool
