"""Random programs that move, alias, view and write, judged bit by bit against a model of a machine with two memories.

``python benchmarks/two_memories.py --programs 5000`` runs them in the default device mode, where one memory stands in for
both, and prints how many gave what the model says; of the first that did not, the lines.

The model is numpy's arrays, each in one of the two memories: a move to the other is a copy, a move to where a tensor lies gives
the tensor itself. Every second program keeps to what can be known. The others also move what an operator computed to where it
lies, which a GPU gives back and torchspan copies (docs/decisions/0008); they are judged by that rule, and counted.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

HOST, DEVICE = "host", "device"
SHAPE = (2, 3)
NAMES_OF = {HOST: ["'cpu'", "cpu"], DEVICE: ["'cuda'", "dev", "'cuda:0'", "0"]}


@dataclass(eq=False)
class Store:
    """What a storage is to the model: where it lies, and whether torchspan can know it."""

    memory: str
    is_known: bool


@dataclass(eq=False)
class Value:
    """A tensor: a view of numpy's array in a store."""

    array: Any
    store: Store


@dataclass
class Module:
    """A module with a parameter and a buffer; `grad` is the parameter's."""

    weight: Value
    buffer: Value
    grad: Value | None = None


class Box(torch.nn.Module):
    """A module with a parameter and a buffer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("buffer", torch.full(SHAPE, 7.0))


@dataclass
class Program:
    """One random program: writes a line at a time, and what the model says that the line did."""

    seed: int
    values: dict[str, Value] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    same: tuple[str, str] | None = None  # two names for one object, after the last line
    num_copied_results: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.is_certain = self.seed % 2 == 0

    # the parts of a line

    def fresh(self, value: Value) -> str:
        name = f"v{len(self.lines)}"
        self.values[name] = value
        return name

    def pick(self, fits: Callable[[Value], bool] = lambda value: True) -> str | None:
        names = [name for name, value in self.values.items() if fits(value)]
        return self.random.choice(names) if names else None

    def whole(self, value: Value) -> bool:
        return value.array.shape == SHAPE and value.array.dtype == np.float32

    def number(self) -> float:
        return float(self.random.randint(-8, 8))

    def data(self) -> Any:
        return np.array([[self.number() for _ in range(3)] for _ in range(2)], dtype=np.float32)

    def new(self, array: Any, memory: str, is_known: bool = True) -> Value:
        return Value(np.array(array), Store(memory, is_known))

    def request(self, memory: str) -> tuple[str, bool]:
        """What names `memory`, and whether it is known to be that one: a name, or what a tensor there answers."""
        there = self.pick(lambda value: value.store.memory == memory)
        if there is not None and self.random.random() < 0.3:
            return f"{there}.device", self.values[there].store.is_known
        return self.random.choice(NAMES_OF[memory]), True

    def moved(self, name: str, memory: str, is_known: bool, is_copy: bool = False, dtype: Any = None) -> Value | None:
        """The value that a move gives; None for a move that a program which is certain does not make."""
        value = self.values[name]
        stays = value.store.memory == memory and not is_copy
        if stays and not (value.store.is_known and is_known):
            if self.is_certain:
                return None
            self.num_copied_results += 1
            stays = False
        if dtype is not None and dtype != value.array.dtype:
            return self.new(value.array.astype(dtype), memory, is_known)
        if not stays:
            return self.new(value.array, memory, is_known)
        return value

    # the lines

    def make(self) -> str:
        data, memory = self.data(), self.random.choice([HOST, DEVICE])
        place, is_known = self.request(memory)
        text = repr(data.tolist())
        name = self.fresh(self.new(data, memory, is_known))
        spellings = [
            f"torch.tensor({text}, device={place})",
            f"torch.empty(2, 3, device={place}).copy_(torch.tensor({text}))",
            f"torch.as_tensor(np.array({text}, np.float32), device={place})",
            f"torch.asarray({text}, device={place})",
            f"load({text}, {place})",
        ]
        if memory == HOST:
            self.values[name].store.is_known = True
            spellings = [
                f"torch.tensor({text})",
                f"torch.from_numpy(np.array({text}, np.float32))",
                f"torch.Tensor({text})",
                f"torch.zeros(2, 3).add_(torch.tensor({text}))",
                f"torch.tensor({text}).pin_memory()",
                f"load({text}, None)",
                f"torch.tensor({text}, device='cpu')",
                f"torch.as_tensor({text}, device=cpu)",
            ]
        elif self.random.random() < 0.3:
            self.values[name].store.is_known = True
            return f"with torch.device('cuda'): {name} = torch.tensor({text})"
        return f"{name} = {self.random.choice(spellings)}"

    def beside(self) -> str | None:
        name = self.pick(self.whole)
        if name is None:
            return None
        number, store = self.number(), self.values[name].store
        new_name = self.fresh(self.new(np.full(SHAPE, number, np.float32), store.memory, store.is_known))
        spelling = self.random.choice(
            [
                f"torch.full_like({name}, {number})",
                f"{name}.new_full((2, 3), {number})",
                f"torch.zeros_like({name}).add_({number})",
            ]
        )
        return f"{new_name} = {spelling}"

    def alias(self) -> str | None:
        name = self.pick()
        if name is None:
            return None
        array, store = self.values[name].array, self.values[name].store
        views: list[tuple[str, Any]] = [(text, array) for text in ("", ".detach()", ".data", f".view_as({name})")]
        views += [("[-1:]", array[-1:])]
        if array.ndim == 2:
            views += [("[0]", array[0]), (".t()", array.T)]
        text, view = self.random.choice(views)
        new_name = self.fresh(Value(view, store))
        return f"{new_name} = {name}{text}"

    def compute(self) -> str | None:
        name = self.pick(self.whole)
        if name is None:
            return None
        array, store = self.values[name].array, self.values[name].store
        other = self.pick(lambda value: self.whole(value) and value.store.memory == store.memory)
        second = self.values[other].array
        text, result = self.random.choice(
            [
                (f"{name} * 2", array * np.float32(2)),
                (f"{name} + {other}", array + second),
                (f"{name}.clone()", array),
                (f"torch.stack([{name}, {other}])[1]", second),
                (f"{name}.double().float()", array),
            ]
        )
        new_name = self.fresh(self.new(result, store.memory, False))
        return f"{new_name} = {text}"

    def write(self) -> str | None:
        name = self.pick()
        if name is None:
            return None
        array, number = self.values[name].array, self.number()
        kind = self.random.randrange(5)
        if kind == 0:
            array += array.dtype.type(number)
            return f"{name}.add_({number})"
        if kind == 1:
            array[...] = number
            return self.random.choice([f"{name}.fill_({number})", f"{name}[...] = {number}", f"{name}.data.fill_({number})"])
        source = self.pick(lambda value: value.array.shape == array.shape)
        second = self.values[str(source)].array
        if kind == 2:
            array[...] = second.copy()
            return f"{name}.copy_({source})"
        if self.values[str(source)].store.memory == self.values[name].store.memory and second.dtype == array.dtype:
            array[...] = second * second.dtype.type(0.5)
            return f"torch.mul({source}.clone(), 0.5, out={name})"
        array *= array.dtype.type(0.5)
        return f"{name} *= 0.5"

    def move(self) -> str | None:
        name = self.pick()
        if name is None:
            return None
        memory = self.random.choice([HOST, DEVICE])
        place, is_known = self.request(memory)
        like = self.pick(lambda value: value.store.memory == memory and value.array.dtype == self.values[name].array.dtype)
        array = self.values[name].array
        own = "torch.float64" if array.dtype == np.float64 else "torch.float32"
        choices: list[tuple[str, bool, bool, Any]] = [
            (f"{name}.to({place})", is_known, False, None),
            (f"{name}.to(device={place})", is_known, False, None),
            (f"{name}.to({place}, {own})", is_known, False, None),
            (f"{name}.to(dtype={own}, device={place}, non_blocking=True)", is_known, False, None),
            (f"{name}.to({place}, copy=True)", is_known, True, None),
            (f"{name}.to({place}, torch.float64)", is_known, False, np.float64),
            (f"torch.as_tensor({name}, device={place})", is_known, False, None),
            (f"torch.asarray({name}, device={place})", is_known, False, None),
            (f"torch.tensor({name}, device={place})", is_known, True, None),
        ]
        if like is not None:
            known = self.values[like].store.is_known
            choices += [
                (f"{name}.to({like})", known, False, None),
                (f"{name}.to(tensor={like}, non_blocking=True)", known, False, None),
            ]
            choices += [(f"{name}.type_as({like})", known, False, None)]
        simple = ["cpu()"] if memory == HOST else ["cuda()", "cuda(0, non_blocking=True)"]
        choices += [(f"{name}.{call}", True, False, None) for call in simple] * 2
        text, is_known, is_copy, dtype = self.random.choice(choices)
        moved = self.moved(name, memory, is_known, is_copy, dtype)
        if moved is None:
            return None
        new_name = self.fresh(moved)
        if moved is self.values[name] and "tensor(" not in text and "asarray(" not in text:
            self.same = (name, new_name)
        elif moved is self.values[name]:
            self.values[new_name] = Value(moved.array, moved.store)
        return f"{new_name} = {text}"

    def to_numpy(self) -> str | None:
        """``x.cpu().numpy()``, seen as a tensor again: of the host, sharing the memory that ``.cpu()`` gave."""
        name = self.pick(self.whole)
        moved = self.moved(name, HOST, True) if name is not None else None
        if moved is None:
            return None
        new_name = self.fresh(Value(moved.array, moved.store))
        return f"{new_name} = torch.from_numpy({name}.cpu().numpy())"

    def module(self) -> str | None:
        """A module: made, moved, seen, differentiated, its gradients cleared."""
        name = self.pick(self.whole)
        if not self.modules or self.random.random() < 0.2:
            if name is None:
                return None
            new_name = f"m{len(self.lines)}"
            self.modules[new_name] = Module(self.values[name], self.new(np.full(SHAPE, 7, np.float32), HOST))
            return f"{new_name} = Box({name})"
        own = self.random.choice(list(self.modules))
        module = self.modules[own]
        kind = self.random.randrange(5)
        if kind == 0:
            part = self.random.choice(["weight", "buffer"])
            value = getattr(module, part)
            return f"{self.fresh(Value(value.array, value.store))} = {own}.{part}.data"
        if kind == 1 and name is not None and module.grad is None:
            if self.values[name].store.memory != module.weight.store.memory:
                return None
            module.grad = self.new(self.values[name].array, module.weight.store.memory, False)
            return f"({own}.weight * {name}).sum().backward()"
        if kind == 2 and module.grad is not None:
            if self.random.random() < 0.5:
                return f"{self.fresh(Value(module.grad.array, module.grad.store))} = {own}.weight.grad.detach()"
            module.grad.array[...] = 0
            return f"{own}.zero_grad(set_to_none=False)"
        return self.move_module(own, module)

    def move_module(self, own: str, module: Module) -> str | None:
        memory = self.random.choice([HOST, DEVICE])
        place, is_known = self.request(memory)
        like = self.pick(lambda value: value.store.memory == memory and value.array.dtype == np.float32)
        choices = [(f"{own}.to({place})", is_known), (f"{own}.to(device={place}, non_blocking=True)", is_known)]
        choices += [(f"{own}.cpu()" if memory == HOST else f"{own}.cuda()", True)]
        if like is not None:
            choices += [(f"{own}.to({like})", self.values[like].store.is_known)]
        text, is_known = self.random.choice(choices)
        parts = {part: getattr(module, part) for part in ("weight", "buffer", "grad")}
        moved: dict[str, Value] = {}
        for part, value in parts.items():
            if value is None:
                continue
            self.values["_"] = value
            values = self.moved("_", memory, is_known)
            del self.values["_"]
            if values is None:
                return None
            moved[part] = values
        for part, value in moved.items():
            setattr(module, part, value)
        return text

    def step(self) -> str:
        """One more line."""
        self.same = None
        kinds = [self.make, self.beside, self.alias, self.alias, self.compute, self.write, self.write, self.write]
        kinds += [self.move, self.move, self.move, self.move, self.to_numpy, self.module, self.module, self.module]
        while True:
            line = self.random.choice(kinds)()
            if line is not None:
                self.lines.append(line)
                return line


def load(data: Any, place: Any) -> torch.Tensor:
    """A tensor that was saved, loaded to `place`."""
    file = io.BytesIO()
    torch.save(torch.tensor(data), file)
    file.seek(0)
    loaded: torch.Tensor = torch.load(file, map_location=torch.device("cuda", place) if isinstance(place, int) else place)
    return loaded


def fault(program: Program, names: dict[str, Any]) -> str:
    """What differs between the program's tensors and the model's; "" if nothing."""
    if program.same is not None and names[program.same[0]] is not names[program.same[1]]:
        return f"{program.same[0]} and {program.same[1]} are two objects, one on a GPU"
    values = {name: names[name] for name in program.values}
    expected = dict(program.values)
    for name, module in program.modules.items():
        for part in ("weight", "buffer"):
            values[f"{name}.{part}"], expected[f"{name}.{part}"] = getattr(names[name], part), getattr(module, part)
        if module.grad is not None:
            values[f"{name}.grad"], expected[f"{name}.grad"] = names[name].weight.grad, module.grad
    for name, value in expected.items():
        array = values[name].detach().numpy()
        if array.dtype != value.array.dtype or not np.array_equal(array, value.array):
            return f"{name} is {array.tolist()} ({array.dtype}), the model says {value.array.tolist()} ({value.array.dtype})"
    return ""


def run(seed: int, num_lines: int = 24) -> tuple[Program, str]:
    """Run the program of this seed; the program, and what went wrong or ""."""
    program = Program(seed)
    names: dict[str, Any] = {"torch": torch, "np": np, "Box": Box, "load": load}
    names |= {"dev": torch.device("cuda"), "cpu": torch.device("cpu"), "__name__": "program"}
    for _ in range(num_lines):
        line = program.step()
        try:
            exec(line, names)
        except Exception as error:  # noqa: BLE001 a line that fails is what is looked for
            return program, f"{type(error).__name__}: {error}"
        wrong = fault(program, names)
        if wrong:
            return program, wrong
    return program, ""


def main() -> None:
    """Run them and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", help="where the result is written as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong, num_copied, num_lines = [], 0, 0
    with Environment(device_patches(Facts(), "auto", Report())):
        for seed in range(options.first, options.first + options.programs):
            program, fault_found = run(seed)
            num_copied += program.num_copied_results > 0
            num_lines += len(program.lines)
            if fault_found:
                wrong.append(seed)
                if len(wrong) == 1:
                    print("\n".join(program.lines), f"\n# seed {seed}: {fault_found}")
    result = {
        "torch": torch.__version__,
        "programs": options.programs,
        "lines": num_lines,
        "as the model says": options.programs - len(wrong),
        "that move a result to where it lies, judged by the rule that this copies": num_copied,
        "wrong, by seed": wrong,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        with open(options.out, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
