"""Writes corpus.txt: some 300 KB of plain prose for the examples to learn from, the same on every machine."""

from __future__ import annotations

import random
from pathlib import Path

PLACES = ["the harbour", "the mill", "the old bridge", "the market", "the lighthouse", "the orchard", "the ferry", "the school"]
PEOPLE = ["Anna", "the baker", "old Tomas", "the pilot", "Miriam", "the clockmaker", "her brother", "the postman", "the widow"]
THINGS = ["a lamp", "a letter", "a basket of pears", "the blue boat", "a broken clock", "the map", "a loaf of bread", "a key"]
WEATHER = ["It rained", "The wind turned", "Snow fell", "Fog came in from the sea", "The sun stood high", "The night was clear"]
TIMES = ["in the morning", "before noon", "at dusk", "after the bells", "when the tide was out", "late in the year"]
VERBS = ["carried", "mended", "lost", "found", "sold", "painted", "hid", "remembered", "asked for", "gave away"]
FEELINGS = ["glad", "tired", "afraid", "quiet", "proud", "sorry", "curious", "content"]
SAYINGS = [
    "Nothing keeps so well as what is shared",
    "The sea gives back what it likes",
    "A short road is long in the dark",
    "One hand washes the other",
    "What is mended twice is loved",
    "Ask the wind and you will be told to wait",
]


def sentence(choose: random.Random) -> str:
    """One sentence."""
    person, other = choose.sample(PEOPLE, 2)
    patterns = [
        f"{choose.choice(WEATHER)} {choose.choice(TIMES)}.",
        f"{person} {choose.choice(VERBS)} {choose.choice(THINGS)} near {choose.choice(PLACES)}.",
        f"{person} was {choose.choice(FEELINGS)}, and {other} was {choose.choice(FEELINGS)} too.",
        f'"{choose.choice(SAYINGS)}," said {person}.',
        f"From {choose.choice(PLACES)} to {choose.choice(PLACES)} it is a short walk, but {person} took the whole day.",
        f"{choose.choice(TIMES)} {person} went down to {choose.choice(PLACES)} and {choose.choice(VERBS)} {choose.choice(THINGS)}.",
        f"Nobody knew why {person} had {choose.choice(['waited', 'come back', 'kept still', 'laughed'])} at {choose.choice(PLACES)}.",
    ]
    text = choose.choice(patterns)
    return text[0].upper() + text[1:]


def corpus(num_characters: int, seed: int = 7) -> str:
    """Paragraphs of sentences, at least `num_characters` long."""
    choose = random.Random(seed)
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < num_characters:
        paragraphs.append(" ".join(sentence(choose) for _ in range(choose.randint(4, 9))) + "\n")
    return "\n".join(paragraphs)


if __name__ == "__main__":
    Path(__file__).with_name("corpus.txt").write_text(corpus(300_000))
