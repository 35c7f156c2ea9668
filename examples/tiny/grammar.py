"""The small English of the tiny corpus: a vocabulary in which every sound has one spelling, and a grammar over it.

Homophones and near homophones are left out on purpose (no ``to`` beside ``two``, no ``washed`` beside ``wash``, no
``a`` beside ``the``), so that a word error is an error of hearing and never one of spelling.
"""

from __future__ import annotations

from collections.abc import Collection
from random import Random

DIGITS = "zero one two three four five six seven eight nine".split()

WORDS: dict[str, list[str]] = {
    "digit": DIGITS,
    "name": "oliver emma jacob sofia daniel maria victor hannah lucas olivia".split(),
    "determiner": "the my this that every another".split(),
    "adjective": (
        "small yellow green heavy empty gentle quiet happy hungry clever broken golden silver wooden purple narrow "
        "old young warm dirty lazy angry famous curious friendly little giant"
    ).split(),
    "animal": (
        "rabbit doctor teacher farmer monkey tiger elephant pilot baker singer dentist captain kitten dog dolphin "
        "student lawyer parrot penguin"
    ).split(),
    "thing": (
        "umbrella lamp table basket guitar bicycle window pencil letter ticket camera hammer blanket bottle jacket "
        "carpet mirror ladder button pillow wallet piano helmet sandwich balloon trumpet"
    ).split(),
    "place": "kitchen library station hotel museum forest village castle office island market bedroom school".split(),
    "past": (
        "found lost carried painted followed noticed wanted borrowed dropped loved sold repaired forgot watched "
        "remembered"
    ).split(),
    "command": "open bring hide move take keep throw".split(),
    "preposition": "under behind beside near inside above around".split(),
    "plural": "apples lemons candles cookies flowers tomatoes potatoes onions carrots".split(),
    "action": "travel dance sleep swim cook laugh listen arrive practice".split(),
    "day": "monday tuesday wednesday thursday friday saturday sunday".split(),
    "time": "today tomorrow tonight yesterday later".split(),
    "weather": "windy rainy foggy sunny cloudy freezing".split(),
    "function": "is was will and with please where why i you we can need not very room number call".split(),
}

TEMPLATES = [
    "determiner adjective animal past determiner thing",
    "determiner animal past determiner adjective thing",
    "determiner animal past determiner thing time",
    "name past determiner adjective thing",
    "name past determiner thing preposition determiner place",
    "name and name past determiner animal",
    "please command determiner adjective thing",
    "please command determiner thing preposition determiner thing",
    "command determiner thing and determiner thing",
    "where is determiner adjective animal",
    "where is determiner thing time",
    "why is determiner animal very adjective",
    "determiner adjective animal is preposition determiner place",
    "determiner thing was adjective and adjective",
    "determiner place is not very adjective",
    "name will action with determiner animal",
    "we will action preposition determiner place time",
    "can you action with name time",
    "i need digit plural and digit plural",
    "name sold digit plural day",
    "you can keep digit adjective plural",
    "day was weather and very weather",
    "determiner place was weather time",
    "name is preposition room digit",
]

DIGIT_TEMPLATES = [
    "digit digit digit",
    "digit digit digit digit",
    "digit digit digit digit digit",
    "digit digit digit digit digit digit",
    "call digit digit digit digit",
    "room number digit digit digit",
]

DIGIT_SHARE = 0.2


def vocabulary() -> list[str]:
    """Every word the grammar can say, sorted."""
    return sorted({word for words in WORDS.values() for word in words})


def sentence(rng: Random) -> str:
    """One sentence of three to seven words, lower-case and without punctuation."""
    templates = DIGIT_TEMPLATES if rng.random() < DIGIT_SHARE else TEMPLATES
    slots = rng.choice(templates).split()
    return " ".join(rng.choice(WORDS[slot]) if slot in WORDS else slot for slot in slots)


def sentences(count: int, rng: Random, excluded: Collection[str] = ()) -> list[str]:
    """``count`` different sentences, none of them in ``excluded``."""
    seen, result = set(excluded), []
    while len(result) < count:
        candidate = sentence(rng)
        if candidate not in seen:
            seen.add(candidate)
            result.append(candidate)
    return result
