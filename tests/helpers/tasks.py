"""lm-eval tasks of every type of request, and requests that belong to no task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lm_eval.api.instance import Instance

DUPLICATES = """
task: twice
custom_dataset: !function data.twice
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_mutual_info
"""
REPEATS = """
task: often
custom_dataset: !function data.twice
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
repeats: 3
generation_kwargs: {until: ["\\n", "a"], do_sample: true, temperature: 1.0, max_gen_toks: 12}
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: upper, filter: [{function: uppercase}, {function: take_first}]}
metric_list:
  - metric: exact_match
"""
DATA = """
from datasets import Dataset, DatasetDict
def twice(**unused):
    docs = [
        {"question": "What is red?", "choices": ["red", "redder", "a", "b"], "answer": 0},
        {"question": "What is the capital of Jorostan?", "choices": ["Peloton", "Isoraford", "x"], "answer": 0},
        {"question": "What is red?", "choices": ["red", "redder", "a", "b"], "answer": 0},
    ]
    return DatasetDict({"test": Dataset.from_list(docs)})
"""
ROLLING = """
task: pages
custom_dataset: !function data.pages
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
LAST_WORD = """
task: last_word
custom_dataset: !function data.pages
output_type: loglikelihood
test_split: test
doc_to_text: "{{page.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+page.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
PAGES = """
def pages(**unused):
    pages = ["The capital of Jorostan is Peloton. " * 25, "What is red?", "The capital of Jorostan is Peloton. " * 25]
    return DatasetDict({"test": Dataset.from_list([{"page": page.strip()} for page in pages])})
"""
GREEDY = (
    REPEATS.replace("repeats: 3\n", "").replace("do_sample: true, temperature: 1.0, ", "").replace("often", "greedy")
)
MIXED = ("pages", "last_word", "twice", "greedy", "often")


def write_tasks(folder: Path) -> None:
    """Write the tasks of MIXED, which have duplicate documents, texts longer than the context, and sampled repeats."""
    files = {"pages": ROLLING, "last_word": LAST_WORD, "twice": DUPLICATES, "greedy": GREEDY, "often": REPEATS}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "data.py").write_text(DATA + PAGES)


def loglikelihoods(pairs: Iterable[tuple[str, str]]) -> list[Instance]:
    """One lm-eval request for each (context, continuation) pair."""
    return [Instance("loglikelihood", {}, pair, 0, metadata=("t", at, 1)) for at, pair in enumerate(pairs)]
