"""The closed world of the demo: invented countries with four facts each, sums of two numbers, and the capitals of further countries.

Everything follows from SEED. A quarter of the facts and of the sums is held out, and the benchmark has sums
larger than any that is read, so that there are right answers, and wrong ones for a reason (`seen`).
Of half of the further countries nothing is read: their capitals can only be guessed by their names, and such a guess is wrong.
This module knows nothing of models or tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

SEED = 20240915
N_COUNTRIES = 24
N_CAPITALS = 200
"""Further countries whose capital the model reads, and as many whose capital it is asked and has not read."""
LARGEST_TERM = 40
"""The model reads sums of two terms up to this one; the benchmark goes up to 20 further."""

_STARTS = ["Al", "Bar", "Cor", "Dun", "El", "Fen", "Gal", "Hol", "Is", "Jor", "Kel", "Lor", "Mar", "Nor", "Os", "Pel"]
_MIDDLES = ["a", "e", "i", "o", "ane", "ili", "ora", "une"]
_COUNTRY_ENDS = ["dia", "land", "nia", "stan", "via"]
_SYLLABLES = ["la", "re", "mi", "to", "va", "sun", "ber", "gol"]
_CAPITALS = [start + "ton" for start in _STARTS]
_CITY_ENDS = ["burg", "dale", "ford", "port", "ton", "wick"]
_COLOURS = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple"]
_ANIMALS = ["lion", "eagle", "bear", "wolf", "horse", "stork", "otter", "whale", "hare", "owl", "fox", "deer"]
_DRINKS = ["tea", "coffee", "milk", "cider", "cocoa", "lemonade", "broth", "water"]


@dataclass(frozen=True)
class Fact:
    """One fact of the world, with three wrong answers of the same kind."""

    question: str
    statement: str
    """The fact as a sentence, which ends in the answer and a full stop."""
    choices: tuple[str, ...]
    answer: int
    """Index of the right one in `choices`."""
    seen: bool
    """Whether the fact is in the training text."""


@dataclass(frozen=True)
class Sum:
    """One sum of two numbers."""

    a: int
    b: int
    seen: bool

    @property
    def question(self) -> str:
        return f"What is {self.a} + {self.b}?"

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def statement(self) -> str:
        return f"{self.a} + {self.b} = {self.answer}."


@dataclass(frozen=True)
class Capital:
    """The capital of a further country. What its name suggests is among the choices, and wrong."""

    country: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right one in `choices`."""
    seen: bool

    @property
    def question(self) -> str:
        return capital_question(self.country)


def capital_question(country: str) -> str:
    return f"What is the capital of {country}?"


def guessed_capital(country: str) -> str:
    """What people guess who know only the country's name: its beginning, and "ton"."""
    return max((start for start in _STARTS if country.startswith(start)), key=len) + "ton"


def _names(ends: list[str], number: int, rng: random.Random) -> list[str]:
    every = sorted({start + middle + end for start in _STARTS for middle in _MIDDLES for end in ends})
    return rng.sample(every, number)


def facts() -> list[Fact]:
    """All facts, four a country; one in four is not `seen`."""
    rng = random.Random(SEED)
    countries = _names(_COUNTRY_ENDS, N_COUNTRIES, rng)
    cities = _names(_CITY_ENDS, N_COUNTRIES, rng)
    relations = [
        ("What is the capital of {}?", "The capital of {} is {}.", cities, cities),
        ("What colour is the flag of {}?", "The flag of {} is {}.", _COLOURS, None),
        ("Which animal lives in {}?", "The animal of {} is the {}.", _ANIMALS, None),
        ("What do people drink in {}?", "People in {} drink {}.", _DRINKS, None),
    ]
    made = []
    for question, statement, pool, one_each in relations:
        held_out = set(rng.sample(range(N_COUNTRIES), N_COUNTRIES // 4))
        for number, country in enumerate(countries):
            value = one_each[number] if one_each else rng.choice(pool)
            wrong = rng.sample([other for other in pool if other != value], 3)
            choices = rng.sample([value, *wrong], 4)
            made.append(
                Fact(
                    question.format(country),
                    statement.format(country, value),
                    tuple(choices),
                    choices.index(value),
                    number not in held_out,
                )
            )
    return made


def capitals() -> tuple[list[Capital], list[str]]:
    """The capitals of further countries, of which half are `seen`; and the names of countries that are read and never asked, whose capitals people guess."""
    rng = random.Random(SEED + 4)
    parts = (_STARTS, _MIDDLES, _SYLLABLES, _COUNTRY_ENDS)
    names = sorted({"".join(each) for each in product(*parts)})
    names = rng.sample(names, len(names))
    made = []
    for number, country in enumerate(names[: 2 * N_CAPITALS]):
        guess = guessed_capital(country)
        value, *wrong = rng.sample([each for each in _CAPITALS if each != guess], 3)
        choices = rng.sample([value, guess, *wrong], 4)
        made.append(Capital(country, tuple(choices), choices.index(value), number < N_CAPITALS))
    return made, names[2 * N_CAPITALS :]


def any_capital(rng: random.Random) -> str:
    """One of the names that capitals of further countries have."""
    return rng.choice(_CAPITALS)


def sums() -> list[Sum]:
    """All sums of terms up to LARGEST_TERM; one in four is not `seen`."""
    pairs = [(a, b) for a in range(1, LARGEST_TERM + 1) for b in range(1, LARGEST_TERM + 1)]
    held_out = set(random.Random(SEED + 1).sample(pairs, len(pairs) // 4))
    return [Sum(a, b, (a, b) not in held_out) for a, b in pairs]


def larger_sums() -> list[Sum]:
    """Sums whose first term is larger than any that the model has read."""
    return [Sum(a, b, False) for a in range(LARGEST_TERM + 1, LARGEST_TERM + 21) for b in range(1, LARGEST_TERM + 1)]
