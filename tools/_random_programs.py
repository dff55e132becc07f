"""Random training programs as readable text: a model, and steps that call it, change it and hook into it.

The text names one thing that is not torch's: ``start(model)``, which gives the model that is to be called. A program that is
run with a ``start`` that gives back what it gets is eager's; the same text with another ``start`` is what is compared with it.
All that a step gives lies afterwards in the names `out` (what the call gave), `given` (its arguments), `events` (what hooks
noted), `noted` and `state` (what the forward noted outside of itself) and `model`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import indent

WIDTH = 4


@dataclass(frozen=True)
class Piece:
    """A part of a model: what its ``__init__`` makes, and what its ``forward`` does; ``{n}`` is a number of its own.

    An `is_pure` one neither draws random numbers nor changes anything, so that threads may run it at the same time.
    """

    name: str
    init: str
    forward: str
    weight: int = 2
    is_pure: bool = True


@dataclass(frozen=True)
class Choice:
    """Lines that may be drawn; ``{call}``, ``{child}``, ``{n}`` and such stand for what the program says."""

    name: str
    text: str
    weight: int = 2
    only_pure: bool = False
    wants_grad: bool = False  # the input is to require a gradient
    is_usual: bool = True  # for a call: one that is compiled, so that a program may consist of such calls


PIECES = (
    Piece("linear", "self.p{n} = nn.Linear(4, 4)", "x = self.p{n}(x)", 8),
    Piece("tanh", "", "x = torch.tanh(x)", 3),
    Piece("gelu", "", "x = F.gelu(x)", 2),
    Piece("softmax", "", "x = x.softmax(-1)", 2),
    Piece("layer norm", "self.p{n} = nn.LayerNorm(4)", "x = self.p{n}(x)"),
    Piece("batch norm", "self.p{n} = nn.BatchNorm1d(4)", "x = self.p{n}(x)", 2, is_pure=False),
    Piece("dropout", "self.p{n} = nn.Dropout(0.5)", "x = self.p{n}(x)", 3, is_pure=False),
    Piece("functional dropout", "", "x = F.dropout(x, 0.3, self.training)", 1, is_pure=False),
    Piece("noise", "", "x = x + torch.rand_like(x)", 1, is_pure=False),
    Piece("a random row", "", "x = x + torch.randn(4).to(x.dtype)", 1, is_pure=False),
    Piece("python's random", "", "x = x * random.random()", 1, is_pure=False),
    Piece("numpy's random", "", "x = x * float(np.random.rand())", 1, is_pure=False),
    Piece("tied", "self.p{n} = nn.Linear(4, 4)", "x = self.p{n}(self.p{n}(x).sin())"),
    Piece("child", "self.p{n} = Child()", "x = self.p{n}(x)", 4),
    Piece("blocks", "self.p{n} = nn.ModuleList(Child() for _ in range(3))", "for block in self.p{n}:\n    x = block(x)", 3),
    Piece("counting child", "self.p{n} = Counting()", "x = self.p{n}(x)", 2, is_pure=False),
    Piece("sequence", "self.p{n} = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))", "x = self.p{n}(x)"),
    Piece("parameter", "self.p{n} = nn.Parameter(torch.ones(4))", "x = x * self.p{n}"),
    Piece("parameter list", "self.p{n} = nn.ParameterList(torch.randn(4) for _ in range(2))", "x = x + sum(self.p{n})", 1),
    Piece("spectral norm", "self.p{n} = spectral_norm(nn.Linear(4, 4))", "x = self.p{n}(x)", 1, is_pure=False),
    Piece("weight norm", "self.p{n} = weight_norm(nn.Linear(4, 4))", "x = self.p{n}(x)", 1),
    Piece("gru", "self.p{n} = nn.GRU(4, 4, batch_first=True)", "x = self.p{n}(x[None])[0][0]", 1),
    Piece("attention", "", "x = F.scaled_dot_product_attention(x[None], x[None], x[None])[0]", 1),
    Piece("own function", "", "x = Doubled.apply(x)"),
    Piece("checkpoint", "self.p{n} = Child()", "x = checkpoint(self.p{n}, x, use_reentrant=False)", 2),
    Piece("no_grad inside", "", "with torch.no_grad():\n    mean = x.mean()\nx = x - mean"),
    Piece(
        "autocast inside",
        "self.p{n} = nn.Linear(4, 4)",
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n    y = self.p{n}(x)\nx = x + y.to(x.dtype)",
        1,
    ),
    Piece("columns", "", "x = torch.cat([x[:, 2:], x[:, :2]], 1)"),
    Piece("index", "", "x = x[:, [1, 0, 3, 2]]", 1),
    Piece("transposed twice", "", "x = x.t().contiguous().t()"),
    Piece("own write", "", "x = x.clone()\nx[:1] = 0.5"),
    Piece("write by mask", "", "x = x.masked_fill(x > 1, 0.25)", 1),
    Piece(
        "buffer added to",
        "self.register_buffer('b{n}', torch.zeros(4))",
        "self.b{n} += x.detach().mean(0)\nx = x + self.b{n}",
        3,
        is_pure=False,
    ),
    Piece(
        "buffer counts",
        "self.register_buffer('b{n}', torch.zeros((), dtype=torch.long))",
        "self.b{n}.add_(1)",
        2,
        is_pure=False,
    ),
    Piece(
        "buffer replaced",
        "self.register_buffer('b{n}', torch.zeros(4))",
        "self.b{n} = 0.5 * self.b{n} + x.detach().sum(0)",
        2,
        is_pure=False,
    ),
    Piece("attribute counts", "self.count{n} = 0", "self.count{n} += 1", 1, is_pure=False),
    Piece("attribute kept", "self.last{n} = None", "self.last{n} = x.detach()", 1, is_pure=False),
    Piece("own list", "self.history{n} = []", "self.history{n}.append(x.shape[0])", 1, is_pure=False),
    Piece("outer list", "", "noted.append(x.shape[0])", 2, is_pure=False),
    Piece("outer list of results", "", "noted.append(x.detach().sum())", 1, is_pure=False),
    Piece("outer dict", "", "state['calls'] = state.get('calls', 0) + 1", 1, is_pure=False),
    Piece("global", "", "count_a_call()", 1, is_pure=False),
    Piece("closure", "", "note_in_closure(x)", 1, is_pure=False),
    Piece("item", "", "noted.append(int((x > 0).sum().item()))", 1, is_pure=False),
    Piece("mode", "self.mode = 'double'", "x = x * 2 if self.mode == 'double' else x - 1", 3),
    Piece("training", "", "x = x * 3 if self.training else x * 0.5", 2),
    Piece("grad mode", "", "x = x * 2 if torch.is_grad_enabled() else x + 1", 1),
    Piece("numbers in a list", "self.factors{n} = [1.5, 2.0]", "for factor in self.factors{n}:\n    x = x * factor", 1),
    Piece("branch on data", "", "if x.sum() > 0:\n    x = x * 2", 1),
    Piece("where", "", "x = torch.where(x > 0, x, x * 0.1)"),
    Piece("raises by data", "", "if x.abs().max() > 1000:\n    raise ValueError(f'too large: {tuple(x.shape)}')", 2),
    Piece(
        "raises in an operator",
        "self.p{n} = nn.Embedding(2, 4)",
        "x = x + self.p{n}((x.detach().abs() > 1000).sum(1))",
        3,
    ),
    Piece("raises by shape", "", "if x.shape[0] == 5:\n    raise OddError('five rows')", 2),
    Piece("asserts", "", "assert x.shape[0] != 7, 'seven rows'", 1),
    Piece("catches", "", "try:\n    check(x)\nexcept OddError:\n    x = -x", 1),
    Piece("double inside", "", "x = x.double().mul(1.5).to(x.dtype)", 1),
)

RETURNS = (
    Choice("x", "return x", 10),
    Choice("a pair", "return x, x * 2", 3),
    Choice("a dict", "return {'x': x, 'sum': x.sum(), 'text': how}", 3),
    Choice("a dataclass", "return Result(x, [x.mean(), None, 3])", 2),
    Choice("a named tuple", "return Pair(x, x.shape[0])", 1),
    Choice("the input too", "return x, first", 2),
    Choice("a view of the input", "return x, first[:1]", 2),
    Choice("a parameter", "return x, next(self.parameters(), None)", 1),
    Choice("twice the same", "return [x, x]", 1),
    Choice("a view", "return x.t()", 2),
    Choice("two views", "return x[:1], x[1:]", 1),
    Choice("with extra", "return x, extra", 2),
    Choice("a detached one", "return x, x.detach()", 1),
    Choice("a list without gradients", "return [x, (x > 0), x.argmax()]", 1),
)

ARGUMENTS = (  # what the forward does with its arguments beside `x`
    Choice("scale", "x = x * scale", 5),
    Choice("branch on scale", "x = x * 2 if scale > 1 else x / 2", 2),
    Choice("text", "x = x + 1 if how == 'more' else x", 3),
    Choice("extra is added", "x = x + sum_of(extra)", 5),
    Choice("extra is written into", "if isinstance(extra, dict):\n    extra['mean'] = x.detach().mean()", 2),
    Choice("extra is appended to", "if isinstance(extra, list):\n    extra.append(x.detach().sum())", 2),
    Choice("extra's tensor is written into", "if isinstance(extra, torch.Tensor):\n    extra.mul_(2)", 1),
    Choice("the input is written into", "x.add_(1)", 2),
    Choice("the input is written into later", "x = x * 1\nfirst.mul_(0.5)", 1),
    Choice("others", "x = x + sum(others.values())", 1),
)

INPUTS = (  # {rows}, and {dtype}: the model's
    Choice("plain", "torch.randn({rows}, 4{dtype})", 10),
    Choice("with gradient", "torch.randn({rows}, 4{dtype}, requires_grad=True)", 5),
    Choice("with history", "torch.randn({rows}, 4{dtype}, requires_grad=True) * 1", 1),
    Choice("transposed", "torch.randn(4, {rows}{dtype}).t()", 2),
    Choice("every second row", "torch.randn(2 * {rows}, 4{dtype})[::2]", 2),
    Choice("expanded", "torch.randn(1, 4{dtype}).expand({rows}, 4)", 1),
    Choice("with an offset", "torch.randn({rows} + 1, 4{dtype})[1:]", 1),
    Choice("a parameter", "nn.Parameter(torch.randn({rows}, 4{dtype}))", 1),
)

ODD_INPUTS = (
    Choice("large", "torch.full(({rows}, 4), 1e6)", 2),
    Choice("no rows", "torch.randn(0, 4)", 2),
    Choice("one row", "torch.randn(1, 4)", 2),
    Choice("five rows", "torch.randn(5, 4)", 3),
    Choice("six rows", "torch.randn(6, 4)", 3),
    Choice("seven rows", "torch.randn(7, 4)", 1),
    Choice("of doubles", "torch.randn({rows}, 4, dtype=torch.float64)", 1),
    Choice("of integers", "torch.arange(4 * {rows}).view({rows}, 4)", 1),
    Choice("of bfloat16", "torch.randn({rows}, 4, dtype=torch.bfloat16)", 1),
    Choice("complex", "torch.randn({rows}, 4, dtype=torch.complex64)", 1),
    Choice("too wide", "torch.randn({rows}, 5)", 2),
    Choice("with NaN", "torch.full(({rows}, 4), float('nan'))", 1),
    Choice("none", "None", 1),
    Choice("nested", "torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])", 1),
    Choice("sparse", "torch.eye(4).to_sparse()", 1),
    Choice("a weight", "next(model.parameters(), torch.ones(4, 4))", 1),
)

SCALES = ("0.5", "2", "1.5", "-0.0", "True", "float('inf')", "torch.tensor(0.5)")
EXTRAS = (
    "None",
    "torch.randn(4)",
    "torch.randn(4, requires_grad=True)",
    "[torch.randn(4), 2]",
    "(torch.randn(4), None)",
    "{'a': torch.randn(4), 'b': [torch.randn(()), 3]}",
    "{'a': 0.5, 'name': 'text'}",
    "{1: torch.randn(4)}",
    "[x, x]",
    "x[0]",
    "x.detach()",
    "[]",
)

CALLS = (
    Choice("train", "out = {call}\ntotal(out).backward()", 10),
    Choice("train and step", "out = {call}\ntotal(out).backward()\noptimizer.step()\noptimizer.zero_grad()", 8),
    Choice("forward", "out = {call}", 5),
    Choice("no_grad", "with torch.no_grad():\n    out = {call}", 4),
    Choice("inference", "with torch.inference_mode():\n    out = {call}", 2),
    Choice("autocast", "with torch.autocast('cpu', dtype=torch.bfloat16):\n    out = {call}\ntotal(out).backward()", 2),
    Choice("kept", "out = {call}\nloss = total(out)\nloss.backward(retain_graph=True)\nloss.backward()", 1),
    Choice(
        "twice",
        "out = {call}\n(slope,) = torch.autograd.grad(total(out), x, create_graph=True)\nslope.square().sum().backward()",
        2,
        wants_grad=True,
    ),
    Choice("gradient of the input", "out = {call}\nout = out, torch.autograd.grad(total(out), x)", 1, wants_grad=True),
    Choice("later", "later = {call}\nout = {call}\ntotal(later).backward()", 1, is_usual=False),
    Choice("two calls, one backward", "out = [{call}, {call}]\n(total(out[0]) + total(out[1])).backward()", 2),
    Choice("vmap", "out = torch.vmap(lambda x: {call}, randomness='same')(torch.stack([x, x * 2]))", 1, is_usual=False),
    Choice("torch.func", "out = torch.func.grad(lambda x: total({call}))(x.detach())", 1, is_usual=False),
    Choice(
        "functional call",
        "out = torch.func.functional_call(model, {k: v * 2 for k, v in model.named_parameters()}, (x,))\ntotal(out).backward()",
        1,
        is_usual=False,
    ),
    Choice("thread", "out = in_threads(1, lambda: {call})", 2, is_usual=False),
    Choice("threads", "out = in_threads(2, lambda: {call})\ntotal(out).backward()", 2, only_pure=True),
    Choice("forward itself", "out = {forward_call}", 1, is_usual=False),
    Choice("inside another", "out = torch.tanh(first_of({call}))\ntotal(out).backward()", 1, is_usual=False),
    Choice(
        "checkpointed", "out = checkpoint(lambda x: {call}, x, use_reentrant=False)\ntotal(out).backward()", 1, is_usual=False
    ),
    Choice(
        "saved elsewhere",
        "with torch.autograd.graph.save_on_cpu():\n    out = {call}\ntotal(out).backward()",
        1,
        is_usual=False,
    ),
    Choice("copied", "copied = copy.deepcopy(model)\nout = copied(x)\ntotal(out).backward()", 1, is_usual=False),
)

CHANGES = (
    Choice("eval", "model.eval()", 5),
    Choice("train", "model.train()", 3),
    Choice("mode", "model.mode = 'single'", 3),
    Choice("frozen", "for parameter in list(model.parameters())[:2]:\n    parameter.requires_grad_(False)", 2),
    Choice("all frozen", "model.requires_grad_(False)", 1),
    Choice("thawed", "model.requires_grad_(True)", 1),
    Choice("weights changed", "with torch.no_grad():\n    for one in model.parameters():\n        one.mul_(0.9)", 2),
    Choice("weights' data", "for one in model.parameters():\n    one.data = one.data * 1.1", 1),
    Choice(
        "loaded",
        "model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})",
        2,
    ),
    Choice(
        "loaded in place of", "model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)", 1
    ),
    Choice("child replaced", "model.last = nn.Linear(4, 4)", 2),
    Choice("child wrapped", "model.last = nn.Sequential(model.last, nn.Tanh())", 1),
    Choice("parameter replaced", "model.last.weight = nn.Parameter(torch.ones(4, 4))", 1),
    Choice("half of it in eval", "model.last.eval()", 1),
    Choice("double", "model.double()", 1),
    Choice("float", "model.float()", 1),
    Choice("bfloat16", "model.bfloat16()", 1),
    Choice("buffer set", "for one in model.buffers():\n    one.fill_(1)", 1),
    Choice("gradients cleared", "model.zero_grad()", 2),
    Choice("gradients kept as zeros", "model.zero_grad(set_to_none=False)", 1),
    Choice("another model", "del model\nmodel = start(Model())\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)", 1),
    Choice("compiled again", "model = start(model)", 1),
    Choice("a copy instead", "model = copy.deepcopy(model)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)", 1),
    Choice("list cleared", "noted.clear()", 1),
    Choice("global changed", "FACTOR[0] = FACTOR[0] + 1", 1),
    Choice("default dtype", "torch.set_default_dtype(torch.float64)", 1),
    Choice("pickled", "copied = pickle.loads(pickle.dumps(model.state_dict()))\nmodel.load_state_dict(copied)", 1),
)

HOOKS = (  # {owner} is model or model.last
    Choice("forward", "handles.append({owner}.register_forward_hook(note_forward))", 3),
    Choice("forward that changes", "handles.append({owner}.register_forward_hook(lambda module, args, out: scaled(out)))", 1),
    Choice("forward with keywords", "handles.append({owner}.register_forward_hook(note_keywords, with_kwargs=True))", 1),
    Choice("forward always", "handles.append({owner}.register_forward_hook(note_forward, always_call=True))", 1),
    Choice("pre", "handles.append({owner}.register_forward_pre_hook(note_before))", 2),
    Choice(
        "pre that changes",
        "handles.append({owner}.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:])))",
        1,
    ),
    Choice("backward", "handles.append({owner}.register_full_backward_hook(note_backward))", 2),
    Choice("backward that changes", "handles.append({owner}.register_full_backward_hook(halve_gradients))", 1),
    Choice("before the backward", "handles.append({owner}.register_full_backward_pre_hook(note_backward_pre))", 1),
    Choice("parameter", "handles.append(model.last.weight.register_hook(lambda grad: note_gradient(grad)))", 3),
    Choice("parameter that changes", "handles.append(model.last.weight.register_hook(lambda grad: grad * 0.5))", 1),
    Choice("accumulated", "handles.append(model.last.weight.register_post_accumulate_grad_hook(note_accumulated))", 1),
    Choice("global", "handles.append(nn.modules.module.register_module_forward_hook(note_forward))", 1),
    Choice("removed", "while handles:\n    handles.pop().remove()", 3),
)

PRELUDE = """\
noted, events, handles, state, given = [], [], [], {}, []
CALLS, FACTOR = 0, [2]


class OddError(Exception):
    pass


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    x: Any
    parts: Any


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 + 0 * x


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.steps += 1
        self.calls += 1
        return x + self.steps.to(x.dtype)


def count_a_call():
    global CALLS
    CALLS += 1


def noting():
    seen = []

    def note(x):
        seen.append(x.shape)
        state["seen"] = len(seen)

    return note


note_in_closure = noting()


def check(x):
    if x.shape[0] == 6:
        raise OddError("six rows")


def sum_of(extra):
    if isinstance(extra, dict):
        return sum(sum_of(one) for one in extra.values())
    if isinstance(extra, (list, tuple)):
        return sum(sum_of(one) for one in extra)
    if isinstance(extra, torch.Tensor):
        return extra.sum()
    return 0 if extra is None or isinstance(extra, str) else extra


def where(module):
    return next((name for name, one in model.named_modules() if one is module), type(module).__name__)


def note_forward(module, args, out):
    events.append(("forward", where(module), type(out).__name__))


def note_keywords(module, args, kwargs, out):
    events.append(("keywords", where(module), len(args), sorted(kwargs)))


def note_before(module, args):
    events.append(("before", where(module), len(args)))


def note_backward(module, into, out):
    events.append(("backward", where(module), len(into), len(out)))


def note_backward_pre(module, out):
    events.append(("before backward", where(module), len(out)))


def halve_gradients(module, into, out):
    return tuple(None if one is None else one * 0.5 for one in into)


def note_gradient(grad):
    events.append(("gradient", tuple(grad.shape)))


def note_accumulated(parameter):
    events.append(("accumulated", tuple(parameter.grad.shape)))


def scaled(out):
    return out * 2 if isinstance(out, torch.Tensor) else out
"""


@dataclass
class Program:
    """One random program: the text of its `setup`, and of each of its `steps`; how it is to be started.

    After the steps in `busy` nothing waits for the compile, so that the next call may come in the middle of it.
    """

    seed: int
    setup: str
    steps: list[str]
    backend: str
    options: dict[str, object]
    busy: set[int]

    def __str__(self) -> str:
        own = self.setup.replace(PRELUDE, "from _random_programs import PRELUDE  # what all programs begin with\n")
        head = f"# seed {self.seed}: backend {self.backend}, {self.options}\n\n{own}"
        body = [
            f"\n# step {number}{', which waits for no compile' * (number in self.busy)}\n{text}"
            for number, text in enumerate(self.steps)
        ]
        return "\n".join([head, *body])


@dataclass
class Draft:
    """Draws the parts of one program."""

    seed: int
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.rows = self.random.choice([2, 3, 4])
        self.uses: list[Choice] = []
        self.dtype = ""

    def program(self) -> Program:
        """The program of this seed."""
        backend = self.random.choices(["eager", "aot_eager", "inductor"], [45, 48, 7])[0]
        setup = self.setup()
        steps = self.steps()
        busy = {number for number in range(1, len(steps)) if self.random.random() < 0.06}
        return Program(self.seed, setup, steps, backend, self.options(), busy)

    def options(self) -> dict[str, object]:
        """How it is compiled, beside the backend."""
        has_blocks = any(choice.name == "blocks" for choice in self.pieces)
        options: dict[str, object] = {"strategy": self.random.choice(["whole", "per_block"]) if has_blocks else "whole"}
        if self.random.random() < 0.1:
            options["dynamic"] = self.random.choice([True, False])
        if self.random.random() < 0.05:
            options["verify"] = self.random.choice(["off", "always"])
        return options

    # the model

    def setup(self) -> str:
        """The classes, the model, its optimizer, and hooks that are there from the first call on."""
        self.pieces = self.random.choices(PIECES, [choice.weight for choice in PIECES], k=self.random.randint(2, 5))
        num_uses = self.random.choice([0, 0, 1, 1, 2])
        self.uses = self.random.choices(ARGUMENTS, [choice.weight for choice in ARGUMENTS], k=num_uses)
        lines = [PRELUDE, "", self.model(), "", ""]
        lines += self.starting()
        return "\n".join(lines)

    def model(self) -> str:
        inits = ["super().__init__()", "self.mode = 'double'", "self.last = nn.Linear(4, 4)"]
        body = [choice.forward.replace("{n}", str(n)) for n, choice in enumerate(self.pieces)]
        inits += [choice.init.replace("{n}", str(n)) for n, choice in enumerate(self.pieces) if choice.init]
        body += [choice.text for choice in self.uses]
        self.random.shuffle(body)
        body.insert(self.random.randint(0, len(body)), "x = self.last(x)")
        if self.random.random() < 0.2:
            body.append("x = x * FACTOR[0]")
        body += [self.pick(RETURNS).text]
        return "\n".join(
            [
                "class Model(nn.Module):",
                "    def __init__(self):",
                indent("\n".join(inits), " " * 8),
                "",
                "    def forward(self, x, scale=1.0, extra=None, *, how='plain', **others):",
                "        first = x",
                indent("\n".join(body), " " * 8),
            ]
        )

    def starting(self) -> list[str]:
        lines = [f"torch.manual_seed({self.seed})", f"random.seed({self.seed})", f"np.random.seed({self.seed})"]
        construction = "Model()"
        if self.random.random() < 0.1:
            kind = self.random.choice([".double()", ".eval()", ".bfloat16()", ".requires_grad_(False)"])
            self.dtype = {".double()": ", dtype=torch.float64", ".bfloat16()": ", dtype=torch.bfloat16"}.get(kind, "")
            construction += kind
        if self.random.random() < 0.15:
            hook = self.hook()
            return [*lines, f"model = {construction}", hook, "model = start(model)", self.optimizer()]
        return [*lines, f"model = start({construction})", self.optimizer()]

    def optimizer(self) -> str:
        return self.random.choice(
            [
                "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
                "optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)",
                "optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)",
            ]
        )

    # the steps

    def steps(self) -> list[str]:
        """Three calls of one kind, so that it is compiled; then changes and other calls, each followed by the usual one."""
        usual = self.call(is_usual=True)
        steps = [usual, usual, usual]
        for _ in range(self.random.randint(2, 4)):
            steps += self.episode(usual)
        return steps

    def episode(self, usual: str) -> list[str]:
        kind = self.random.choices(["change", "hook", "other call", "odd call"], [5, 4, 5, 3])[0]
        if kind == "change":
            return [f"{self.pick(CHANGES).text}\n{usual}", usual]
        if kind == "hook":
            return [f"{self.hook()}\n{usual}", usual]
        if kind == "other call":
            other = self.call()
            return [other] * self.random.choice([1, 2, 3]) + [usual]
        return [self.call(self.pick(ODD_INPUTS)), usual]

    def hook(self) -> str:
        owner = self.random.choice(["model", "model.last"])
        return self.pick(HOOKS).text.replace("{owner}", owner)

    def call(self, inputs: Choice | None = None, is_usual: bool = False) -> str:
        """One call in one of the ways to call, with its arguments."""
        ways = [choice for choice in CALLS if self.is_pure or not choice.only_pure]
        way = self.pick([choice for choice in ways if choice.is_usual or not is_usual])
        inputs = inputs or self.pick(INPUTS)
        lines = [f"x = {inputs.text.replace('{rows}', str(self.rows)).replace('{dtype}', self.dtype)}"]
        if way.wants_grad:
            lines.append("x = x.detach().requires_grad_()")
        named = self.arguments()
        extras = []
        for number, (name, value) in enumerate(named):
            if name == "extra":
                lines.append(f"extra = {value}")
                named[number] = (name, "extra")
                extras = ["extra"]
        lines.append(f"given = [{', '.join(['x', *extras])}]")
        text = ", ".join(["x", *(f"{name}={value}" for name, value in named)])
        body = way.text.replace("{call}", f"model({text})").replace("{forward_call}", f"model.forward({text})")
        return "\n".join([*lines, body])

    def arguments(self) -> list[tuple[str, str]]:
        """Keyword arguments; those that the forward does not read come too, seldom."""
        names = {choice.name for choice in self.uses}
        is_read = {
            "scale": any("scale" in name for name in names),
            "extra": any("extra" in name for name in names),
            "how": "text" in names,
            "alpha": "others" in names,
        }
        values = {"scale": SCALES, "extra": EXTRAS, "how": ("'more'", "'less'"), "alpha": ("1", "0.5", "torch.ones(4)")}
        chosen = [name for name, is_wanted in is_read.items() if self.random.random() < (0.8 if is_wanted else 0.05)]
        return [(name, self.random.choice(values[name])) for name in chosen]

    @property
    def is_pure(self) -> bool:
        writes = any("written" in choice.name or "appended" in choice.name for choice in self.uses)
        return all(choice.is_pure for choice in self.pieces) and not writes

    def pick(self, choices: Sequence[Choice]) -> Choice:
        return self.random.choices(choices, [choice.weight for choice in choices])[0]


def program(seed: int) -> Program:
    """The program of this seed."""
    return Draft(seed).program()
