"""Text metrics: how positive a text sounds, and how often it uses the words of a category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from AutomaticEval.analysis.words.keywords import Words
from AutomaticEval.errors import ModelUnavailable, SelectionError, first_line


class TextMetric(NamedTuple):
    """A function that gives one number for each text."""

    name: str
    unit: str
    """What the number is, for the axes of figures."""
    of: Callable[[Sequence[str]], list[float]]
    """A number for each text."""


def vader() -> TextMetric:
    """VADER's compound score, from -1 (negative) to 1 (positive). VADER is a lexicon and needs no network."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return TextMetric(
        "sentiment",
        "VADER compound, -1 to 1",
        lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts],
    )


def classifier(name: str, label: str | None = None) -> TextMetric:
    """The probability that a Hugging Face text classifier gives to a label; by default the label that begins with "pos".

    name: a hub name or a folder. Raises ModelUnavailable, and SelectionError for a label that the classifier does not have.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(name).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as failure:
        raise ModelUnavailable(f"the classifier {name!r} cannot be loaded: {first_line(failure)}") from None
    labels = list(model.config.label2id)
    chosen = label if label is not None else next((each for each in labels if each.lower().startswith("pos")), None)
    if chosen not in labels:
        raise SelectionError(f"{name!r} has no label {chosen or 'pos…'!r}; it has {', '.join(labels)}. Name one.")

    def scores(texts: Sequence[str]) -> list[float]:
        probabilities = []
        for text in texts:
            given = tokenizer(text or " ", return_tensors="pt", truncation=True)
            with torch.no_grad():
                likely = model(**given).logits.float().softmax(-1)
            probabilities.append(float(likely[0, model.config.label2id[chosen]]))
        return probabilities

    return TextMetric("sentiment", f"probability of {chosen}, {name}", scores)


def keywords(words: Sequence[str]) -> TextMetric:
    """How many of a text's words are among these words, in upper or lower case. Raises PromptError for a word that could never be found."""
    known = Words(words)
    return TextMetric(
        "keywords", "keywords a response", lambda texts: [float(len(known.found(text))) for text in texts]
    )
