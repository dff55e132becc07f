"""Data: bytes of a text, in windows that are drawn from a seed; each rank gets its part of the same batch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchspan.core.errors import InputError

VOCAB_SIZE = 256
END_OF_TEXT = ord("\n")
"""The token that ends a document: a line of a text is one."""

_WORDS = """
the miller|a young captain|the old clock|her brother|every gull|the schoolmaster|a patient dog|the river
watched|carried|forgot|mended|followed|remembered|counted|painted
the boats|a letter|the long road|her silence|the lanterns|seven stones|the harbour|a borrowed coat
before dawn|without a word|in the rain|as if nothing had happened|until the bells rang|once more
"""


def generated_text(num_sentences: int = 4000) -> str:
    """Prose, of a kind, the same on every machine; three sentences a line.

    >>> generated_text(1)
    'The old clock followed a letter in the rain.'
    """
    draw = random.Random(20)
    parts = [line.split("|") for line in _WORDS.split("\n") if line]  # subject, verb, object, adverbial
    sentences = [" ".join(draw.choice(words) for words in parts) for _ in range(num_sentences)]
    whole = [sentence.capitalize() + "." for sentence in sentences]
    return "\n".join(" ".join(whole[first : first + 3]) for first in range(0, len(whole), 3))


@dataclass(frozen=True)
class ByteTokens:
    """A text as bytes, (N,): the vocabulary is the 256 values of a byte.

    >>> ByteTokens.of("Hey").tokens_N.tolist()
    [72, 101, 121]
    """

    tokens_N: Tensor

    @staticmethod
    def of(text: str) -> ByteTokens:
        """The bytes of `text` in UTF-8."""
        return ByteTokens(torch.tensor(list(text.encode()), dtype=torch.long))

    @staticmethod
    def load(path: Path | None) -> ByteTokens:
        """The bytes of the file at `path`, or of generated text."""
        if path is None:
            return ByteTokens.of(generated_text())
        try:
            return ByteTokens.of(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as cause:
            raise InputError(f"cannot read the dataset {path}: {cause}; expected a text file in UTF-8") from cause

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, each (B, S): a function of `seed` and `step` alone."""
        num_starts = len(self.tokens_N) - seq_len
        if num_starts < 1:
            raise InputError(
                f"the dataset has {len(self.tokens_N)} tokens, a sequence needs {seq_len + 1}; give more text or a smaller "
                "--training.seq_len"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts_B = torch.randint(num_starts, (batch_size,), generator=generator)
        window_BS = starts_B[:, None] + torch.arange(seq_len + 1)
        tokens_BS = self.tokens_N[window_BS]
        return tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()


def part_of(batch_BS: Tensor, rank: int, num_ranks: int) -> Tensor:
    """The rows of a batch that one of `num_ranks` ranks gets.

    >>> part_of(torch.arange(4)[:, None], rank=1, num_ranks=2).tolist()
    [[2], [3]]
    """
    if len(batch_BS) % num_ranks:
        raise InputError(
            f"--training.global_batch_size is {len(batch_BS)}, which {num_ranks} data-parallel ranks do not divide; "
            f"expected a multiple of {num_ranks}"
        )
    return batch_BS.chunk(num_ranks)[rank]
