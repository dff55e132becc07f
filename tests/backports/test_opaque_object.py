"""Classes of opaque objects are registered and asked for as on newer torch; where they cannot be used, the use says so."""

from __future__ import annotations

import enum

import pytest
import torch

from torchspan.backports._base import REGISTRY
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("opaque_object").BACKPORT
IS_NATIVE = hasattr(torch._C, "_register_opaque_type")

pytestmark = pytest.mark.usefixtures("environment")


def test_kinds_of_classes_are_told_apart() -> None:
    from torch._library import opaque_object as opaque

    assert opaque.OpaqueBase is opaque.CustomClassBase and opaque.OpaqueBaseMeta is opaque.CustomClassBaseMeta

    class Queue(opaque.CustomClassBase):
        pass

    class Deeper(Queue):
        pass

    class Point:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Point)

        def __hash__(self) -> int:
            return 0

        def __fx_repr__(self) -> tuple[str, dict[str, type]]:
            return "Point()", {"Point": Point}

    opaque.register_opaque_type(Queue, typ="reference")
    opaque.register_custom_class(Point, typ="constant")
    assert opaque.is_opaque_value(Queue()) and opaque.is_custom_class(Deeper) and opaque.is_opaque_type(Point)
    assert opaque.is_opaque_symbolic_type(Queue) and not opaque.is_opaque_constant_type(Queue)
    assert opaque.is_opaque_value_type(Point) and not opaque.is_opaque_reference_type(Point)
    assert opaque.get_opaque_type_name(Queue).endswith("Queue")
    assert opaque.get_opaque_obj_repr(Point())[0] == "Point()"
    assert isinstance(Queue(), opaque.CustomClassBase)
    assert not opaque.is_opaque_value(3) and not opaque.is_opaque_value(torch.ones(1))
    assert type(Queue) is type(opaque.CustomClassBase)


def test_what_cannot_be_one_is_refused() -> None:
    from torch._library import opaque_object as opaque

    class Plain:
        pass

    with pytest.raises(ValueError, match="Unable to register built-in type <class 'int'>"):
        opaque.register_custom_class(int, typ="symbolic")
    with pytest.raises(TypeError, match="must subclass"):
        opaque.register_custom_class(Plain, typ="symbolic")
    with pytest.raises(TypeError, match="__eq__"):
        opaque.register_custom_class(Plain, typ="constant")
    with pytest.raises(ValueError, match="is not registered"):
        opaque.get_opaque_type_name(Plain)


def test_enumerations_are_values_from_the_start() -> None:
    from torch._library import opaque_object as opaque

    class Colour(enum.Enum):
        RED = 1

    if IS_NATIVE and not opaque.is_custom_class(Colour):
        pytest.skip("this torch registers no enumerations")
    assert opaque.is_opaque_constant_type(Colour)
    assert opaque.get_opaque_obj_repr(Colour.RED) == ("Colour.RED", {"Colour": Colour})


def test_an_operator_that_takes_one_can_be_defined_and_its_call_says_why_it_cannot_work() -> None:
    from torch._library import opaque_object as opaque

    class Handle(opaque.CustomClassBase):
        pass

    opaque.register_opaque_type(Handle, typ="reference")
    if IS_NATIVE:
        pytest.skip("torch has such operators")

    def use(x: torch.Tensor, handle: Handle) -> torch.Tensor:
        return x.clone()

    use.__annotations__ = {"x": torch.Tensor, "handle": Handle, "return": torch.Tensor}
    operator = torch.library.custom_op("torchspan_test::use", use, mutates_args=())
    operator.register_fake(lambda x, handle: torch.empty_like(x))
    operator.register_autograd(lambda ctx, grad: (grad, None))
    with pytest.raises(UnsupportedError, match=r"custom operator torchspan_test::use: handle is an opaque Handle, .* 2\.10\.0"):
        operator(torch.ones(2), Handle())


def test_a_schema_that_names_one_is_refused_with_the_reason() -> None:
    if IS_NATIVE:
        pytest.skip("torch has such operators")
    from torch._library.opaque_object import OpaqueBase, get_opaque_type_name, register_opaque_type

    class Stack(OpaqueBase):
        pass

    register_opaque_type(Stack, typ="reference")
    library = torch.library.Library("torchspan_test", "FRAGMENT")
    with pytest.raises(UnsupportedError, match=r"Stack is a class of opaque objects.*since 2\.10\.0; give it a tensor"):
        library.define(f"push({get_opaque_type_name(Stack)} stack, Tensor x) -> ()")
    library.define("pushed(Tensor x) -> Tensor")
