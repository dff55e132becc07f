"""Runs the questions of a test file on gloo ranks: ``python _ranks.py FILE ANSWERS``.

The file's QUESTIONS says for a number of ranks which functions they run, one after the other, all backports in force. The
ranks are forks, so that torch is imported once. ANSWERS is JSON: for each question the tracebacks of ranks where it failed.
"""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchspan.backports._base import all_backports
from torchspan.environment.scope import Environment

Question = Callable[[], None]


def rank_program(rank: int, num_ranks: int, rendezvous: str, questions: Sequence[Question], answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    for question in questions:
        try:
            question()
        except BaseException:
            answers.put((question.__name__, f"rank {rank} of {num_ranks}: {traceback.format_exc()}"))
            raise  # others may wait for this rank for ever: they are ended
        answers.put((question.__name__, None))
    dist.barrier()
    dist.destroy_process_group()


def ask(num_ranks: int, questions: Sequence[Question]) -> dict[str, list[str]]:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    failures = {question.__name__: ["it was not asked: one before it failed"] for question in questions}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, num_ranks, f"{folder}/rendezvous", questions, answers) for rank in range(num_ranks)]
        ranks = [context.Process(target=rank_program, args=rank_arguments, daemon=True) for rank_arguments in arguments]
        for rank in ranks:
            rank.start()
        for _ in range(num_ranks * len(questions)):
            name, failure = answers.get(timeout=120)
            failures[name] = [failure] if failure else []
            if failure:
                break
        else:
            for rank in ranks:
                rank.join(60)
    return failures


def main(file: str, output: str) -> None:
    torch.set_num_threads(1)
    with Environment([patch for backport in all_backports() for patch in backport.patches()]):
        questions_of = runpy.run_path(file)["QUESTIONS"]
        Path(output).write_text(json.dumps({num: ask(num, questions) for num, questions in questions_of.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
