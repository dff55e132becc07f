"""The patch engine: lazy, reversible, and silent where nothing is missing."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from functools import partial

import pytest

from torchspan.core.report import Report
from torchspan.environment.patch import MissingModule, MissingName, Patches, Redefinition, Replacement
from torchspan.environment.scope import Environment, active_environment


@pytest.fixture
def target() -> Iterator[types.ModuleType]:
    module = types.ModuleType("a_target")
    module.__path__ = []  # type: ignore[attr-defined]
    exec("def present(x):\n    return x + 1\nclass Thing:\n    def method(self):\n        return 'old'\n", vars(module))
    sys.modules["a_target"] = module
    yield module
    del sys.modules["a_target"]


def test_a_missing_name_is_built_when_it_is_first_looked_up_and_recorded_with_its_site(
    target: types.ModuleType,
) -> None:
    built: list[int] = []
    report = Report()
    patches = Patches([MissingName("mine", "a_target", "absent", lambda: built.append(1) or "new", "because")], report)
    patches.apply()
    assert built == [] and report.decisions == ()
    assert target.absent == "new" and target.absent == "new"
    assert built == [1]
    (decision,) = report.decisions
    assert decision.subject == "a_target.absent" and decision.site is not None
    assert decision.site.rpartition(":")[0] == __file__
    with pytest.raises(AttributeError, match="module 'a_target' has no attribute 'other'"):
        _ = target.other


def test_undo_restores_the_identity_of_every_object(target: types.ModuleType) -> None:
    before, method = dict(vars(target)), target.Thing.__dict__["method"]
    patches = Patches(
        [
            MissingName("mine", "a_target", "absent", lambda: 1, ""),
            MissingName("mine", "a_target", "present", lambda: 1, ""),
            Replacement("mine", "a_target", "present", lambda old: lambda x: old(x) * 10),
            Replacement("mine", "a_target", "Thing.method", lambda old: lambda self: "new"),
            Replacement("mine", "a_target", "Thing.lacking", lambda old: 1),
        ],
        Report(),
    )
    patches.apply()
    assert target.absent == 1 and target.present(1) == 20 and target.Thing().method() == "new"
    assert not hasattr(target.Thing, "lacking")
    patches.undo()
    assert vars(target) == before
    assert target.Thing.__dict__["method"] is method


def test_a_missing_module_is_importable_until_it_is_undone(target: types.ModuleType) -> None:
    report = Report()
    patches = Patches([MissingModule("mine", "a_target.sub", lambda: {"value": 7}, "because")], report)
    patches.apply()
    from a_target.sub import value  # type: ignore[import-not-found]

    assert value == 7 and [d.subject for d in report.decisions] == ["a_target.sub"]
    patches.undo()
    assert "a_target.sub" not in sys.modules and not hasattr(target, "sub")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("a_target.sub")


def test_a_real_module_wins_over_a_backport_of_it() -> None:
    patches = Patches([MissingModule("mine", "this", lambda: {"value": 7}, "")], Report())
    patches.apply()
    try:
        import colorsys  # a module that is really there, and is not shadowed by the finder

        assert not hasattr(colorsys, "value")
        assert importlib.util.find_spec("colorsys").origin != "torchspan"  # type: ignore[union-attr]
    finally:
        patches.undo()


def test_a_patch_waits_for_its_module_to_be_imported(run_python) -> None:
    run_python(
        """
        import sys
        from torchspan.core.report import Report
        from torchspan.environment.patch import MissingName, Patches, Replacement
        patches = Patches([MissingName("m", "colorsys", "absent", lambda: 5, ""),
                           Replacement("m", "colorsys", "rgb_to_hsv", lambda old: "replaced")], Report())
        patches.apply()
        assert "colorsys" not in sys.modules
        import colorsys
        assert colorsys.absent == 5 and colorsys.rgb_to_hsv == "replaced"
        patches.undo()
        assert callable(colorsys.rgb_to_hsv) and not hasattr(colorsys, "absent")
        """
    )


def test_an_environment_is_idempotent_and_a_context_manager(target: types.ModuleType) -> None:
    environment = Environment([Replacement("mine", "a_target", "present", lambda old: "new")])
    original = target.present
    with environment, environment.activate():
        assert target.present == "new" and active_environment() is environment
    assert target.present is original and active_environment() is None
    environment.deactivate()
    assert target.present is original


def test_names_bound_before_follow_a_replacement_and_come_back(target: types.ModuleType) -> None:
    original = target.present
    program = {"__builtins__": __builtins__, "__name__": "program", "present": original, "partial": partial(original, 1)}
    exec("def later(x, function=present):\n    return function(x)", program)
    patches = Patches([Replacement("mine", "a_target", "present", lambda old: lambda x: old(x) * 10, follow=True)], Report())
    patches.apply()
    assert program["present"](1) == 20 and program["partial"]() == 20 and program["later"](1) == 20
    patches.undo()
    assert program["present"] is original and program["partial"].func is original
    assert program["later"].__defaults__ == (original,)


def test_a_redefined_function_stays_the_object_that_it_was(target: types.ModuleType) -> None:
    original, code = target.present, target.present.__code__
    bound = target.present
    patches = Patches([Redefinition("mine", "a_target", "present", lambda old: lambda x, times=10: old(x) * times)], Report())
    patches.apply()
    assert target.present is original and bound(1) == 20 and bound(x=1, times=3) == 6
    assert str(inspect.signature(bound)) == "(x)"
    patches.undo()
    assert bound(1) == 2 and bound.__code__ is code and vars(bound) == {} and bound.__kwdefaults__ is None


def test_a_redefined_generator_stays_a_generator_and_its_decorator_still_applies(target: types.ModuleType) -> None:
    exec("import contextlib\n@contextlib.contextmanager\ndef opened(x):\n    yield x\n", vars(target))
    original, bound = inspect.unwrap(target.opened), target.opened
    code, closed = original.__code__, []

    def build(old):
        def opened(x, times=10):
            try:
                sent = yield next(old(x)) * times
            finally:
                closed.append(x)
            return sent

        return opened

    patches = Patches([Redefinition("mine", "a_target", "opened", build)], Report())
    patches.apply()
    assert inspect.isgeneratorfunction(original) and target.opened is bound
    with bound(1) as ten:
        assert ten == 10 and closed == []
    with pytest.raises(ZeroDivisionError), bound(x=2, times=3) as six:
        assert six == 6 and 1 / 0
    assert closed == [1, 2]
    generator = original(3)
    assert next(generator) == 30
    with pytest.raises(StopIteration) as stop:
        generator.send("sent")
    assert stop.value.value == "sent"
    patches.undo()
    with bound(1) as value:
        assert value == 1 and original.__code__ is code


def test_an_async_function_is_replaced_as_a_closure_is(target: types.ModuleType) -> None:
    exec("async def fetched(x):\n    return x\n", vars(target))
    original, code = target.fetched, target.fetched.__code__
    patches = Patches([Redefinition("mine", "a_target", "fetched", lambda old: lambda x: (old, x))], Report())
    patches.apply()
    assert target.fetched(1) == (original, 1) and original.__code__ is code
    patches.undo()
    assert target.fetched is original
