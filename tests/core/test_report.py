"""A Report: what is counted, what is passed on, what is printed, and that threads do not lose anything."""

from __future__ import annotations

import json
import threading

import pytest

from torchspan.core.errors import InputError
from torchspan.core.report import Attempt, Decision, Report, reporting
from torchspan.core.topics import Standing, Topic

pytestmark = pytest.mark.once


def test_the_same_choice_is_counted_and_another_site_is_another_entry() -> None:
    report = Report()
    for site in ("a.py:1", "a.py:1", "a.py:2"):
        report.decide("device", "cuda", "cpu", "no CUDA device here", site)
    assert [(decision.site, decision.count) for decision in report.decisions] == [("a.py:1", 2), ("a.py:2", 1)]


def test_entries_reach_the_parent_and_a_tally_counts_on_there() -> None:
    parent = Report()
    child = Report(parent=parent)
    tally = child.tally("device", "cuda", "cpu", "why")
    tally.count += 2
    child.attempt(Attempt("whole", "Net", "inductor", "compiled", 1.0))
    child.figure("first_step_wait_s", 0.5)
    tally.count += 1
    assert parent.decisions == child.decisions and parent.decisions[0].count == 3
    assert parent.attempts == child.attempts and parent.figures == {"first_step_wait_s": 0.5}


def test_threads_lose_no_count() -> None:
    report = Report()
    threads = [
        threading.Thread(target=lambda: [report.decide("pass", "p", "done", "why") for _ in range(200)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [decision.count for decision in report.decisions] == [1600]


def test_json_and_back_gives_the_same_decisions() -> None:
    report = Report()
    report.decide("device", "torch.cuda.Stream()", "simulated", "in order", "a.py:1", Standing.SIMULATED)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["decisions"][0]["topic"] == "device" and values["decisions"][0]["standing"] == "simulated"
    assert tuple(map(Decision.from_dict, values["decisions"])) == report.decisions
    assert report.decisions[0].topic is Topic.DEVICE


def test_a_topic_that_is_none_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"topic is 'devices'; expected one of backport, device, compile"):
        Report().decide("devices", "a", "b", "c")


def test_it_prints_what_it_holds_and_a_notebook_shows_the_same() -> None:
    report = Report()
    assert str(report) == "nothing was changed"
    report.decide("compile", "Net<1>", "whole", "one region")
    report.attempt(Attempt("whole", "Net<1>", "inductor", "timeout", 2.0, cause="not done after 2 s; ended"))
    assert str(report).splitlines() == [
        "compiled",
        "  Net<1> → whole (one region)",
        "timeout Net<1> by whole in 2.0 s: not done after 2 s; ended",
    ]
    assert "Net&lt;1&gt;" in report._repr_html_()


def test_a_report_is_the_current_one_inside_the_block_only() -> None:
    from torchspan.core.report import current_report

    before, report = current_report(), Report()
    with reporting(report):
        assert current_report() is report
    assert current_report() is before
