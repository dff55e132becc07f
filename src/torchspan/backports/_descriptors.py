"""What the inputs and outputs of AOTAutograd's graphs mean.

An input's descriptor says how it comes from the inputs of the program; an output's, how it becomes an output of it. They nest:
a gradient is of an input, the part of a tensor subclass is of an input or output. Names and fields are upstream's.
"""

from __future__ import annotations

from dataclasses import dataclass

PLACE = "torch._functorch._aot_autograd.descriptors"


@dataclass(frozen=True)
class AOTInput:
    """Where an input of a graph comes from."""

    def expr(self) -> str:
        """As an expression over the program's inputs."""
        raise NotImplementedError(f"{type(self).__name__} has no expression")

    def is_param(self) -> bool:
        """Whether it is a parameter or a part of one."""
        return False

    def is_buffer(self) -> bool:
        """Whether it is a buffer or a part of one."""
        return False

    def is_tangent(self) -> bool:
        """Whether it is a tangent or a part of one."""
        return False


@dataclass(frozen=True)
class DifferentiableAOTInput(AOTInput):
    """An input that may have a gradient."""


@dataclass(frozen=True)
class AOTOutput:
    """What an output of a graph becomes."""

    def expr(self) -> str:
        """As an expression over the program's outputs."""
        raise NotImplementedError(f"{type(self).__name__} has no expression")

    def is_grad(self) -> bool:
        """Whether it is a gradient or a part of one."""
        return False


@dataclass(frozen=True)
class DifferentiableAOTOutput(AOTOutput):
    """An output that may have a tangent."""


@dataclass(frozen=True)
class ParamAOTInput(DifferentiableAOTInput):
    """The parameter of the module with the name `target`."""

    target: str

    def expr(self) -> str:
        return f"self.get_parameter({self.target!r})"

    def is_param(self) -> bool:
        return True


@dataclass(frozen=True)
class BufferAOTInput(DifferentiableAOTInput):
    """The buffer of the module with the name `target`."""

    target: str

    def expr(self) -> str:
        return f"self.get_buffer({self.target!r})"

    def is_buffer(self) -> bool:
        return True


@dataclass(frozen=True)
class PlainAOTInput(DifferentiableAOTInput):
    """The input number `idx` of the program, flattened."""

    idx: int

    def expr(self) -> str:
        return f"args[{self.idx}]"


@dataclass(frozen=True)
class DummyAOTInput(AOTInput):
    """An input of which no more is known than its place."""

    idx: int

    def expr(self) -> str:
        return f"__dummy{self.idx}"


@dataclass(frozen=True)
class SubclassGetAttrAOTInput(AOTInput):
    """A tensor that a tensor subclass, the input `base`, holds as `attr`."""

    base: AOTInput
    attr: str

    def expr(self) -> str:
        return f"{self.base.expr()}.{self.attr}"

    def is_param(self) -> bool:
        return self.base.is_param()

    def is_buffer(self) -> bool:
        return self.base.is_buffer()

    def is_tangent(self) -> bool:
        return self.base.is_tangent()


@dataclass(frozen=True)
class SubclassSizeAOTInput(AOTInput):
    """The dynamic size of a tensor subclass in dimension `idx`."""

    base: AOTInput
    idx: int

    def expr(self) -> str:
        return f"{self.base.expr()}.size({self.idx})"


@dataclass(frozen=True)
class SubclassStrideAOTInput(AOTInput):
    """The dynamic stride of a tensor subclass in dimension `idx`."""

    base: AOTInput
    idx: int

    def expr(self) -> str:
        return f"{self.base.expr()}.stride({self.idx})"


@dataclass(frozen=True)
class ViewBaseAOTInput(DifferentiableAOTInput):
    """What the input `base_of`, and others, are views of."""

    base_of: AOTInput

    def expr(self) -> str:
        return f"{self.base_of.expr()}._base"


@dataclass(frozen=True)
class SyntheticBaseAOTInput(DifferentiableAOTInput):
    """A tensor over all the memory that the input `base_of` shares with others, made because they have no base."""

    base_of: AOTInput

    def expr(self) -> str:
        return f"__make_synthetic_base({self.base_of.expr()})"


@dataclass(frozen=True)
class PhiloxForwardSeedAOTInput(AOTInput):
    """The random seed of a forward with functionalized random numbers."""

    def expr(self) -> str:
        return "__philox_forward_seed"


@dataclass(frozen=True)
class PhiloxForwardBaseOffsetAOTInput(AOTInput):
    """The random offset of a forward with functionalized random numbers."""

    def expr(self) -> str:
        return "__philox_forward_base_offset"


@dataclass(frozen=True)
class PhiloxBackwardSeedAOTInput(AOTInput):
    """The random seed of a backward with functionalized random numbers."""

    def expr(self) -> str:
        return "__philox_backward_seed"


@dataclass(frozen=True)
class PhiloxBackwardBaseOffsetAOTInput(AOTInput):
    """The random offset of a backward with functionalized random numbers."""

    def expr(self) -> str:
        return "__philox_backward_base_offset"


@dataclass(frozen=True)
class ForwardTokenAOTInput(AOTInput):
    """A token that keeps the forward's side effects in order."""

    idx: int

    def expr(self) -> str:
        return f"__forward_token{self.idx}"


@dataclass(frozen=True)
class BackwardTokenAOTInput(AOTInput):
    """A token that keeps the backward's side effects in order."""

    idx: int

    def expr(self) -> str:
        return f"__backward_token{self.idx}"


@dataclass(frozen=True)
class TangentAOTInput(DifferentiableAOTInput):
    """The gradient that comes in for `output`."""

    output: DifferentiableAOTOutput

    def expr(self) -> str:
        return f"__output_tangent({self.output.expr()})"

    def is_tangent(self) -> bool:
        return True


@dataclass(frozen=True)
class PlainAOTOutput(DifferentiableAOTOutput):
    """The output number `idx` of the program, flattened."""

    idx: int

    def expr(self) -> str:
        return f"output[{self.idx}]"


@dataclass(frozen=True)
class InputMutationAOTOutput(DifferentiableAOTOutput):
    """What the program writes into `mutated_input`."""

    mutated_input: AOTInput

    def expr(self) -> str:
        return f"__input_mutation({self.mutated_input.expr()})"


@dataclass(frozen=True)
class IntermediateBaseAOTOutput(DifferentiableAOTOutput):
    """What the output `base_of`, and others, are views of."""

    base_of: AOTOutput

    def expr(self) -> str:
        return f"__intermediate_base({self.base_of.expr()})"


@dataclass(frozen=True)
class MetadataMutationAOTOutput(DifferentiableAOTOutput):
    """An input whose shape or strides the program changes, of several that share memory."""

    idx: int

    def expr(self) -> str:
        return f"__aliased_arg_with_metadata_mutation{self.idx}"


@dataclass(frozen=True)
class GradAOTOutput(DifferentiableAOTOutput):
    """The gradient of `grad_of`."""

    grad_of: DifferentiableAOTInput

    def expr(self) -> str:
        return f"__grad({self.grad_of.expr()})"

    def is_grad(self) -> bool:
        return True


@dataclass(frozen=True)
class PhiloxUpdatedForwardOffsetAOTOutput(AOTOutput):
    """The random offset after a forward with functionalized random numbers."""

    def expr(self) -> str:
        return "__philox_updated_forward_offset"


@dataclass(frozen=True)
class PhiloxUpdatedBackwardOffsetAOTOutput(AOTOutput):
    """The random offset after a backward with functionalized random numbers."""

    def expr(self) -> str:
        return "__philox_updated_backward_offset"


@dataclass(frozen=True)
class ForwardTokenAOTOutput(AOTOutput):
    """The token after the forward's side effects."""

    idx: int

    def expr(self) -> str:
        return f"__forward_token{self.idx}"


@dataclass(frozen=True)
class BackwardTokenAOTOutput(AOTOutput):
    """The token after the backward's side effects."""

    idx: int

    def expr(self) -> str:
        return f"__backward_token{self.idx}"


@dataclass(frozen=True)
class SubclassGetAttrAOTOutput(AOTOutput):
    """A tensor that a tensor subclass, the output `base`, will hold as `attr`."""

    base: AOTOutput
    attr: str

    def expr(self) -> str:
        return f"{self.base.expr()}.{self.attr}"

    def is_grad(self) -> bool:
        return self.base.is_grad()


@dataclass(frozen=True)
class SubclassSizeAOTOutput(AOTOutput):
    """The dynamic size of a tensor subclass in dimension `idx`."""

    base: AOTOutput
    idx: int

    def expr(self) -> str:
        return f"{self.base.expr()}.size({self.idx})"


@dataclass(frozen=True)
class SubclassStrideAOTOutput(AOTOutput):
    """The dynamic stride of a tensor subclass in dimension `idx`."""

    base: AOTOutput
    idx: int

    def expr(self) -> str:
        return f"{self.base.expr()}.stride({self.idx})"


@dataclass(frozen=True)
class DummyAOTOutput(AOTOutput):
    """An output of which no more is known than its place."""

    idx: int

    def expr(self) -> str:
        return f"__dummy{self.idx}"


@dataclass(frozen=True)
class SavedForBackwardsAOTOutput(AOTOutput):
    """The value number `idx` that the forward keeps for the backward."""

    idx: int

    def expr(self) -> str:
        return f"__saved_for_backwards_{self.idx}"


for _class in [value for value in globals().values() if getattr(value, "__module__", None) == __name__]:
    _class.__module__ = PLACE
