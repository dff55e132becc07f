"""The cache folder: damaged entries are noticed, dropped and made anew, and the oldest go when it is over its limit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.caches import ledger
from torchspan.core.errors import InputError
from torchspan.core.numerics import difference
from torchspan.jobs.budget import Budget
from torchspan.strategies._compile import compile_bounded

WITHIN = Budget(seconds=200)


def program(x: torch.Tensor) -> torch.Tensor:
    return (x * 3).sin() + x.cos()


def compiled_once(**more: Any) -> Any:
    compiled = compile_bounded(program, strategy="whole", handback="caches", wait=True, budget=WITHIN, **more)
    x = torch.randn(6, 5)
    assert difference(compiled(x), program(x)) is None
    torch._dynamo.reset()
    return compiled.report


def reasons(report: Any, choice: str) -> list[str]:
    return [decision.reason for decision in report.decisions if decision.choice == choice]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, server: None) -> Iterator[Path]:
    """A cache folder that one compile has filled."""
    folder, before = tmp_path_factory.mktemp("filled"), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    assert [attempt.outcome for attempt in compiled_once().attempts] == ["compiled"]
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    if before is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    return folder


def noted(folder: Path) -> dict[str, str]:
    """What the ledger of the latest compile names; a record for the next start has one of its own."""
    ledgers = map(ledger._read, ledger._ledgers(folder))
    return [names for names in ledgers if not any(name.startswith("torchspan") for name in names)][-1]


def entries(folder: Path, kind: str) -> list[Path]:
    return [folder / name for name in noted(folder) if name.startswith(kind) or name.endswith(kind)]


def test_a_compile_notes_what_it_left_and_all_of_it_is_there(filled: Path) -> None:
    assert all(entries(filled, kind) for kind in ("fxgraph", "aotautograd", ".so"))
    assert ledger.check(filled, noted(filled)) == []


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("kind", ["fxgraph", "aotautograd", ".so"])
def test_a_damaged_entry_is_dropped_reported_and_made_anew(
    filled: Path, cache: Path, kind: str, damage: Callable[[Path], None], nothing_left: Callable[[], None]
) -> None:
    shutil.copytree(filled, cache)
    (damaged, *_) = entries(cache, kind)
    damage(damaged)
    report = compiled_once()
    assert report.attempts[-1].outcome == "compiled"
    named = [text for choice in ("dropped", "compiled again") for text in reasons(report, choice)]
    assert any(text.startswith(ledger.DAMAGED) and str(damaged.relative_to(cache)) in text for text in named), report.decisions
    assert ledger.check(cache, noted(cache)) == []
    nothing_left()


def test_a_library_that_a_killed_linker_left_is_made_anew(filled: Path, cache: Path) -> None:
    shutil.copytree(filled, cache)
    (library, *_) = entries(cache, ".so")
    shutil.rmtree(cache / "torchspan")  # no ledger: the compile that made it did not end
    truncate(library)
    report = compiled_once()
    assert report.attempts[-1].outcome == "compiled"
    assert str(library.relative_to(cache)) in str(report.decisions)


@pytest.mark.once
def test_an_entry_that_is_damaged_after_the_compile_is_never_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, truncated = ledger.check, []

    def damage_first(folder: Path, files: Any) -> list[str]:
        if not truncated:
            truncated.append(next(name for name in files if name.endswith(".so")))
            truncate(folder / truncated[0])
        return check(folder, files)

    monkeypatch.setattr(ledger, "check", damage_first)
    report = compiled_once()
    assert [attempt.outcome for attempt in report.attempts] == ["failed", "compiled"]
    assert report.attempts[0].cause == f"{ledger.DAMAGED} {truncated[0]}"


@pytest.mark.once
def test_over_the_limit_the_entries_that_were_used_longest_ago_go(tmp_path: Path) -> None:
    def leave(name: str, *others: str) -> None:
        (tmp_path / name).write_bytes(bytes(1000))
        ledger.write(tmp_path, {entry: ledger.digest(tmp_path / entry) for entry in (name, *others)})
        for count, path in enumerate(ledger._ledgers(tmp_path)):
            os.utime(path, (count, count))

    leave("a")
    leave("b")
    leave("c", "a")
    (tmp_path / "of somebody else").write_bytes(bytes(1000))
    assert ledger.evict(tmp_path, 3000) is None
    reason = ledger.evict(tmp_path, 2000)
    assert reason == "the cache held 2.9 KiB of 2.0 KiB; the entries used longest ago were removed: 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "of somebody else", "torchspan"]


@pytest.mark.once
def test_the_limit_is_a_setting_and_a_compile_says_what_it_removed(filled: Path, cache: Path, monkeypatch: Any) -> None:
    shutil.copytree(filled, cache)
    old = entries(cache, ".so")
    monkeypatch.setenv(ledger.LIMIT_VARIABLE, "1KiB")
    compiled = compile_bounded(lambda x: x.exp() - 7, strategy="whole", handback="caches", wait=True, budget=WITHIN)
    compiled(torch.randn(4, 4))
    (reason,) = reasons(compiled.report, "evicted")
    assert "the entries used longest ago were removed" in reason
    assert not any(path.exists() for path in old)
    monkeypatch.setenv(ledger.LIMIT_VARIABLE, "much")
    with pytest.raises(InputError, match="'much' is no size in bytes"):
        compile_bounded(program)


@pytest.mark.once
def test_what_was_loaded_is_in_torchs_mega_cache_too() -> None:
    compiled_once()
    artifacts = torch.compiler.save_cache_artifacts()
    assert artifacts is not None
    assert artifacts[1].aot_autograd_artifacts and artifacts[1].inductor_artifacts
