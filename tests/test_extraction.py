"""The answer in what models really write. A new habit of a model is a new row here."""

from __future__ import annotations

import pytest

from AutomaticEval import extract_answer

CITIES = ["Paris", "Rome", "Berlin", "Madrid"]
YEARS = ["1952", "1953", "1954", "1955"]
NUMBERS = ["3", "3.5", "35", "5"]

WITH_CHOICES = [
    ("FINAL ANSWER: B", YEARS, "B"),
    ("FINAL ANSWER: b", YEARS, "B"),
    ("Final Answer: (C)", YEARS, "C"),
    ("final answer - none given", YEARS, None),
    ("**Final answer:** (B) 1953", YEARS, "B"),
    ("**Final Answer**: B", YEARS, "B"),
    ("**FINAL ANSWER: B**", YEARS, "B"),
    ("### Final Answer: **D**", YEARS, "D"),
    ("FINAL ANSWER:\nB", YEARS, "B"),
    ("FINAL ANSWER: B. 1953", YEARS, "B"),
    ("FINAL ANSWER: B) 1953", YEARS, "B"),
    ("FINAL ANSWER: B - 1953", YEARS, "B"),
    ("FINAL ANSWER: B, because it was 1953.", YEARS, "B"),
    ("FINAL ANSWER: 1953", YEARS, "B"),
    ("FINAL ANSWER: It was in 1953.", YEARS, "B"),
    ("FINAL ANSWER: Option C", YEARS, "C"),
    ("FINAL ANSWER: [B]", YEARS, "B"),
    ('FINAL ANSWER: "B"', YEARS, "B"),
    ("FINAL ANSWER: $B$", YEARS, "B"),
    ("FINAL ANSWER: \\boxed{B}", YEARS, "B"),
    ("FINAL ANSWER: B<|eot_id|>", YEARS, "B"),
    ("Final answer： C", YEARS, "C"),
    ("FINAL ANSWER = A", YEARS, "A"),
    ("The final answer is B.", YEARS, "B"),
    ("First I thought FINAL ANSWER: A but no.\nFINAL ANSWER: C", YEARS, "C"),
    ('I will finish with "FINAL ANSWER: <letter>".\nFINAL ANSWER: D', YEARS, "D"),
    ('I was told to write "FINAL ANSWER: <letter>".', YEARS, None),
    ("FINAL ANSWER: B\n\nExplanation: the answer is not A, since that came later.", YEARS, "B"),
    ("Thus \\boxed{C}", YEARS, "C"),
    ("Thus $\\boxed{\\text{C}}$.", YEARS, "C"),
    ("Thus \\boxed{\\text{(C) 1954}}", YEARS, "C"),
    ("\\boxed{1953}", YEARS, "B"),
    ("The answer is D.", YEARS, "D"),
    ("The correct answer is: D", YEARS, "D"),
    ("The correct answer is **D) 1955**.", YEARS, "D"),
    ("So the answer would be (A).", YEARS, "A"),
    ("The answer must be option C.", YEARS, "C"),
    ("The correct option is B, as shown above.", YEARS, "B"),
    ("I think the answer is B because of the treaty.", YEARS, "B"),
    ("The answer is not A. The answer is C.", YEARS, "C"),
    ("The answer is Berlin.", CITIES, "C"),
    ("The answer is a city in Italy, namely Rome.", CITIES, "B"),
    ("The answer is Rome or Berlin.", CITIES, None),
    ("Answer: D", YEARS, "D"),
    ("**Answer:** D) 1955", YEARS, "D"),
    ("A is wrong, and B is correct.", YEARS, "B"),
    ("Let me think.\n\nB", YEARS, "B"),
    ("Let me think.\n(B)", YEARS, "B"),
    ("Let me think.\n**B.**", YEARS, "B"),
    ("Let me think.\nB. 1953", YEARS, "B"),
    ("Rome", CITIES, "B"),
    ("rome.", CITIES, "B"),
    ("FINAL ANSWER: 3.5", NUMBERS, "B"),
    ("The answer is 3.5.", NUMBERS, "B"),
    ("The answer is 35.", NUMBERS, "C"),
    ("FINAL ANSWER: E", YEARS, None),
    ("FINAL ANSWER: London", CITIES, None),
    ("<think>The answer is A.</think>The answer is B.", YEARS, "B"),
    ("<think>The answer is A. But wait", YEARS, None),
    ("A long story that never comes to an", YEARS, None),
    ("FINAL ANSWER: <B>", YEARS, "B"),
    (" B\n\nQuestion: What next?\nAnswer: C", YEARS, "B"),
    ("Answer: (C) Berlin\n\nQuestion: And then?\nAnswer: D", CITIES, "C"),
    ("Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.", YEARS, "B"),
    ("FINAL ANSWER: A, B", YEARS, None),
    ("FINAL ANSWER: A or B", YEARS, None),
    ("FINAL ANSWER: B", ["B", "A"], "B"),
    ("FINAL ANSWER: I cannot determine it", [*YEARS, *CITIES, "x"], None),
    ("I'd go with C.", YEARS, "C"),
    ("I would choose (B).", YEARS, "B"),
    ("B is not the answer.\nMy answer: C", YEARS, "C"),
    ("Answer - C", YEARS, "C"),
    ("The answer is definitely C.", YEARS, "C"),
    ("d", YEARS, "D"),
    ("d)", YEARS, "D"),
    ("(d)", YEARS, "D"),
    ("A", YEARS, "A"),
    ("", YEARS, None),
    ("   \n", YEARS, None),
]

OPEN = [
    ("FINAL ANSWER: Paris", "Paris"),
    ("FINAL ANSWER: 42.", "42"),
    ("**Final answer:** 42", "42"),
    ("FINAL ANSWER: 3.14", "3.14"),
    ("FINAL ANSWER: $1,000", "1,000"),
    ("so x = \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("21 + 21 = 42\n#### 42", "42"),
    ("The answer is Paris.", "Paris"),
    ("The answer is 3.5 km. It is far.", "3.5 km"),
    ("Answer: Paris", "Paris"),
    ("I am sure.\nC", "C"),
    ("FINAL ANSWER: <42>", "42"),
    ("Final Answer: The final answer is $\\boxed{42}$. I hope it is correct.", "42"),
    ("so \\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("I do not know", None),
    ("The capital is", None),
    ('Finish with "FINAL ANSWER: <answer>".', None),
    ("", None),
]


@pytest.mark.parametrize(("text", "choices", "expected"), WITH_CHOICES)
def test_answer_with_choices_is_a_letter(text: str, choices: list[str], expected: str | None) -> None:
    assert extract_answer(text, choices) == expected


@pytest.mark.parametrize(("text", "expected"), OPEN)
def test_answer_without_choices_is_text(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected
