"""Logs name the program's own file, line and function, by level and by folder; without being asked, there are none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from torchspan.core.errors import InputError
from torchspan.core.logs import parse_log_spec
from torchspan.core.report import Attempt, Report, user_site

PROGRAM = """\
import torch
def build():
    for _ in range(2):
        x = torch.ones(1, device="cuda")
    return x
build()
"""


def test_a_decision_is_logged_as_from_the_line_that_made_it(caplog: pytest.LogCaptureFixture) -> None:
    report = Report(Report())
    with caplog.at_level("INFO", "torchspan"):
        for _ in range(2):
            report.decide("device", "cuda", "cpu", "no CUDA device here", user_site())
    (record,) = caplog.records
    assert (record.name, record.pathname, record.funcName) == ("torchspan.devices", __file__, record.funcName)
    assert record.funcName == "test_a_decision_is_logged_as_from_the_line_that_made_it"
    assert record.getMessage() == "cuda → cpu (no CUDA device here)"


def test_each_occurrence_is_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "torchspan.devices"):
        report = Report()
        report.tally("device", "cuda", "cpu", "no CUDA device here", "a.py:3").count += 1
        report.tally("device", "cuda", "cpu", "no CUDA device here", "a.py:3").count += 1
        report.decide("backport", "torch.thing", "ours", "torch lacks it", "a.py:1")
    assert [record.levelname for record in caplog.records if record.name == "torchspan.devices"] == ["INFO", "DEBUG", "DEBUG"]
    assert report.decisions[0].count == 2


def test_an_attempt_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "torchspan"):
        Report(Report()).attempt(Attempt("whole", "model", "inductor", "compiled", 1.0))
    assert [record.name for record in caplog.records] == ["torchspan.strategies"]


def test_levels_are_by_folder() -> None:
    assert parse_log_spec("") == {}
    assert parse_log_spec("warning, strategies=INFO") == {"torchspan": "WARNING", "torchspan.strategies": "INFO"}
    for text, message in (("inf", "no level 'inf'; did you mean 'info'?"), ("device=info", "did you mean 'devices'?")):
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            parse_log_spec(text)


@pytest.mark.once
@pytest.mark.parametrize(("how", "spec", "levels"), [("run", "error,devices=debug", "IDD"), ("", "info", "I"), ("", "", "")])
def test_the_variable_shows_them_on_standard_error(run_python, tmp_path: Path, how: str, spec: str, levels: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ("-m", "torchspan", "run", "--quiet", "--compile", "off", "program.py") if how == "run" else ("program.py",)
    process = run_python(None, *command, env={"TORCHSPAN": "1", "TORCHSPAN_LOG": spec})
    shown = [line for line in process.stderr.splitlines() if "torchspan.devices" in line]
    assert "".join(line[0] for line in shown) == levels
    assert all(line[2:].startswith("torchspan.devices program.py:4 build] torch.ones(device='cuda') → cpu") for line in shown)


@pytest.mark.once
def test_a_program_configures_its_own_logging(run_python, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import logging\nlogging.basicConfig(level='INFO', format='mine %(message)s')\nlogging.info('hi')\n"
    )
    process = run_python(None, "-m", "torchspan", "run", "--quiet", "program.py")
    assert process.stderr.splitlines()[-1] == "mine hi"


@pytest.mark.once
def test_a_mistake_in_the_variable_is_one_line(run_python, tmp_path: Path) -> None:
    process = run_python(None, "-m", "torchspan", "passes", env={"TORCHSPAN_LOG": "loud"}, expect=2)
    assert len(process.stderr.strip().splitlines()) == 1 and "no level 'loud'" in process.stderr


def test_logs_are_those_of_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    assert logging.getLogger("torchspan").handlers == []  # torchspan adds none before it is asked to
