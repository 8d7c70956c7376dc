"""The labelled prompt sets that come with the package: what a category is told by, and what not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from AutomaticEval.analysis.words.profiles import Profile, load_profile
from AutomaticEval.errors import PromptError

SIZES = {"baseline": 70, "extended": 100}


@pytest.fixture(params=list(SIZES))
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


def test_categories_are_told_by_their_keywords_alone(profile: Profile) -> None:
    assert list(profile.prompts) == ["gratitude", "anger", "apology", "neutral"]
    assert profile.models == ("gpt2", "EleutherAI/pythia-160m", "EleutherAI/gpt-neo-125m")
    lists = list(profile.keywords.values())
    assert len({word for each in lists for word in each}) == sum(map(len, lists))
    for category, texts in profile.prompts.items():
        assert len(texts) == SIZES[profile.name]
        for text in texts:
            words = set(re.findall(r"[\w']+", text.lower()))
            told = {name for name, own in profile.keywords.items() if words & set(own)}
            assert told == ({category} - {"neutral"}), text


def test_texts_are_varied_and_unfinished(profile: Profile) -> None:
    texts = [text for each in profile.prompts.values() for text in each]
    assert max(Counter(" ".join(text.lower().split()[:5]) for text in texts).values()) == 1
    assert not [text for text in texts if text != text.strip() or text.endswith((".", "!", "?"))]


def test_length_does_not_give_the_category_away(profile: Profile) -> None:
    """Nearest neighbours by words and characters, trained without the texts of the same place in each category."""
    features = np.array(
        [[[len(text.split()), len(text) / 5] for text in texts] for texts in profile.prompts.values()], dtype=float
    )
    n_categories, n_texts, _ = features.shape
    labels = np.arange(n_categories).repeat(n_texts - 1)
    for n_neighbours in (1, 15):
        right = 0
        for place in range(n_texts):
            others = np.delete(features, place, axis=1).reshape(-1, 2)
            for category in range(n_categories):
                distance = ((others - features[category, place]) ** 2).sum(1)
                nearest = labels[np.argsort(distance, kind="stable")[:n_neighbours]]
                right += int(np.bincount(nearest, minlength=n_categories).argmax() == category)
        assert right / (n_categories * n_texts) < 0.33  # chance is 0.25
    means = features.mean(1)
    assert np.ptp(means, axis=0).max() / means.min() < 0.05


def test_the_larger_profile_begins_with_the_smaller() -> None:
    small, large = load_profile("baseline"), load_profile("extended")
    assert all(large.prompts[category][:70] == texts for category, texts in small.prompts.items())
    assert small.keywords == large.keywords


@pytest.mark.parametrize(
    ("toml", "line", "says"),
    [
        ('[keywords]\na = "thank"', '{"category": "a", "text": "b"}', "keywords of 'a' are no list of words: 'thank'"),
        ('keywords = ["thank"]', '{"category": "a", "text": "b"}', "keywords is no table"),
        ('[keywords]\na = [""]', '{"category": "a", "text": "b"}', "are no list of words"),
        ('models = "demo"', '{"category": "a", "text": "b"}', "models is no list of names"),
        ("", '{"category": "a", "text": null}', "line 1: an empty text, or no text"),
    ],
)
def test_profiles_that_are_not_what_they_should(toml: str, line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(line)
    (tmp_path / "mine.toml").write_text(f'neutral = "a"\nprompts = "mine.jsonl"\n{toml}')
    with pytest.raises(PromptError, match=says):
        load_profile(tmp_path / "mine.toml")
