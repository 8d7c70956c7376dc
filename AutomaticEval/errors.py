"""Every exception of this project.

    AutomaticEvalError                  the base; the command line prints it in one line and exits with 2
    ├── SelectionError                  the sites, layers or positions to keep do not exist or cannot be read
    │   ├── UnknownSite
    │   ├── UnknownLayer
    │   └── UnknownPositions
    ├── PromptError                     the question cannot be asked
    │   ├── EmptyPrompt
    │   ├── PromptTooLong
    │   └── DatasetUnavailable
    ├── ModelError                      the model cannot be had, or cannot be captured
    │   ├── ModelUnavailable
    │   ├── DeviceUnavailable
    │   ├── UnsupportedModel
    │   ├── SiteUnavailable
    │   ├── TreeUnsuitable
    │   └── GraphUnsuitable
    ├── BenchmarkError                  the benchmark cannot be had, or cannot be captured
    │   ├── UnknownBenchmark
    │   └── BenchmarkUnavailable
    ├── StoreError                      a file or folder cannot be written or read
    │   ├── PathExists
    │   ├── FolderNotWritable
    │   ├── FolderInUse
    │   ├── OtherSettings
    │   ├── DiskFull
    │   ├── FileRefused
    │   ├── UnreadableFile
    │   │   ├── NotActivations
    │   │   ├── TruncatedFile
    │   │   ├── DamagedFile
    │   │   ├── MissingFilter
    │   │   └── NewerFormat
    │   ├── RefusedPickle
    │   └── ManySamples
    ├── EditError                       an intervention cannot be made as it is asked for
    ├── TrackingUnavailable             an experiment tracker is not installed, or refused the run
    └── CaptureError                    what the hooks saw is not what was expected; nothing is stored

Messages name the thing, what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class AutomaticEvalError(Exception):
    """The base of every error this project raises on purpose."""

    exit_code = 2
    """What the command line exits with: 2 when the request is refused, 1 when a run had begun or a file is damaged."""

    def interrupts_run(self) -> None:
        """Say that a run had begun when this was raised."""
        self.exit_code = 1


class SelectionError(AutomaticEvalError, ValueError):
    """The sites, layers or positions to keep do not exist or cannot be read."""


class UnknownSite(SelectionError):
    """No site has this name."""


class UnknownLayer(SelectionError):
    """The model has no such layer, or the layers cannot be read."""


class UnknownPositions(SelectionError):
    """The positions cannot be read."""


class PromptError(AutomaticEvalError, ValueError):
    """The question itself cannot be asked."""


class EmptyPrompt(PromptError):
    """There is nothing in the prompt."""


class PromptTooLong(PromptError):
    """The prompt does not fit into the model's context."""


class DatasetUnavailable(PromptError):
    """Texts cannot be had: the data set does not exist, or is out of reach."""


class ModelError(AutomaticEvalError):
    """The model cannot be had, or cannot be captured."""


class ModelUnavailable(ModelError):
    """The model is missing, gated, or out of reach without a network."""


class DeviceUnavailable(ModelError):
    """The device asked for is not there."""


class UnsupportedModel(ModelError):
    """The parts of the model were not found, or do not add up, so that it cannot be captured truly."""


class SiteUnavailable(ModelError):
    """This model has no such site, or the site failed its check."""


class TreeUnsuitable(ModelError):
    """The model cannot be scored over a prefix tree."""


class GraphUnsuitable(ModelError):
    """A decode step of the model cannot be replayed from a graph."""


class BenchmarkError(AutomaticEvalError):
    """The benchmark cannot be had, or cannot be captured."""


class UnknownBenchmark(BenchmarkError):
    """lm-eval knows no task of this name."""


class BenchmarkUnavailable(BenchmarkError):
    """The task is known, but its data cannot be had."""


class StoreError(AutomaticEvalError):
    """A file or folder cannot be written or read."""


class PathExists(StoreError):
    """The file exists already, and is not overwritten without being asked to."""


class FolderNotWritable(StoreError):
    """The folder cannot be made or written."""


class FolderInUse(StoreError):
    """Another process is writing into the folder."""


class OtherSettings(StoreError):
    """Runs that should be one were made with different settings."""


class DiskFull(StoreError):
    """The disk has less room than is needed."""


class FileRefused(StoreError):
    """The operating system does not give the bytes of the file, which may be undamaged."""


class UnreadableFile(StoreError):
    """The file cannot be read."""


class NotActivations(UnreadableFile):
    """The file is not HDF5, or was not written by this project."""


class TruncatedFile(UnreadableFile):
    """The file was cut short or damaged."""


class DamagedFile(UnreadableFile):
    """The content of the file does not match its checksums."""

    exit_code = 1


class MissingFilter(UnreadableFile):
    """The file is compressed with a filter that is not installed."""


class NewerFormat(UnreadableFile):
    """The file was written by a newer version."""


class RefusedPickle(StoreError):
    """The file is a pickle that could run code; it is never unpickled."""


class ManySamples(StoreError):
    """The path holds several samples where one was asked for."""


class EditError(AutomaticEvalError, ValueError):
    """An intervention cannot be made as it is asked for."""


class TrackingUnavailable(AutomaticEvalError):
    """The experiment tracker that was asked for is not installed, or did not take the run."""


class CaptureError(AutomaticEvalError):
    """What the hooks saw is not what was expected; nothing was stored."""


class NotFinite(CaptureError):
    """The model computed infinite numbers or NaN, and strict was asked for. They are stored, like everything before them."""


_registry: dict[str | tuple[str, type[Warning], int], int] = {}
"""What Python remembers of the warnings that were shown, so that it shows a sentence once."""


def warn(sentence: str) -> None:
    """Warn in a sentence, as a UserWarning, without the line of our code that Python would show below it.

    Python's filters decide whether it is shown, by default once a process.
    """
    warnings.warn_explicit(sentence, UserWarning, "<AutomaticEval>", 1, registry=_registry)


def first_line(failure: BaseException) -> str:
    """The first line of another library's error, or its class's name when it has no text."""
    return next(iter(str(failure).splitlines()), type(failure).__name__)


SAME_MEANING = (
    ("layers_to_capture", "layers", "layer"),
    ("positions", "position", "token_positions"),
    ("sites", "site", "hooks", "hook_points"),
    ("stop_strings", "stop", "stop_sequences", "until", "gen_kwargs"),
    ("max_new_tokens", "max_tokens", "max_length", "max_gen_toks", "n_tokens", "gen_kwargs"),
    ("limit", "num_trials", "num_samples", "n_samples", "max_samples", "n"),
    ("num_fewshot", "fewshot", "n_shots", "shots"),
    ("output", "save_path", "activation_save_dir", "output_dir", "save_dir", "output_path"),
    ("dtype", "torch_dtype", "precision"),
    ("store_dtype", "save_dtype"),
    ("apply_chat_template", "chat_template", "use_chat_template"),
    ("system_prompt", "system_instruction", "system"),
    ("peft", "adapter", "lora"),
    ("overwrite", "force", "exist_ok", "replace"),
    ("batch_size", "bs", "inference_batch_size"),
)
"""Words that other functions, here and in other libraries, have for one thing. Those that are options here come first."""


def unknown_option(name: str, known: Iterable[str]) -> TypeError:
    """The TypeError for a keyword that a function does not have, with the one that means the same, or that is spelled alike."""
    known = list(known)
    same = next((each for words in SAME_MEANING if name in words for each in words if each in known), None)
    meant = did_you_mean(name, known) if same is None else f" Did you mean {same!r}?"
    return TypeError(f"no option {name!r}.{meant} Options: {', '.join(known)}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x' or 'y'?", or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
