# %% [markdown]
# # Precompile, step by step
#
# A model is captured, its graphs are looked at and compiled; then it is saved, and loaded in a fresh process that compiles nothing.
# Run it as it stands (`python examples/precompile_walkthrough.py`), or cell by cell in an editor that knows `# %%`.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import torchspan


class Classifier(nn.Module):
    """Two layers and a norm: small enough for its graphs to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(torch.relu(self.first(x))))


def build() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


# %% [markdown]
# ## 1. dynamo: one FX graph, the bytecode around it, and the guards under which both are right


# %%
def show_capture() -> None:
    model, x = build(), torch.randn(4, 8)
    gm, bytecode, guards, inputs = torchspan.Precompile.dynamo(model, x)
    print("== the graph that dynamo captured")
    print(gm.code.strip())
    print(f"== its bytecode: {bytecode.co_name}, {len(bytecode.co_code)} bytes; {len(list(guards))} guards, the first three:")
    for guard in list(guards)[:3]:
        print("  ", guard)

    # ## 2. AOTAutograd: functional graphs of operators, one of the forward and one of the backward, each given to a compiler
    def shows(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        print(f"== a graph of {sum(node.op == 'call_function' for node in graph.graph.nodes)} operators goes to the compiler")
        print(graph.code.strip())
        return graph

    compiled, guards = torchspan.Precompile.aot_autograd(gm, guards, compiler=shows)
    compiled(inputs).sum().backward()
    reference = build()
    reference(x).sum().backward()
    same = all(torch.allclose(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    print(f"== gradients equal eager's: {same}")
    try:
        compiled((torch.randn(5, 8),))
    except torchspan.core.errors.GuardError as refused:
        print(f"== another shape: {str(refused)[:90]} …")


# %% [markdown]
# ## 3. An artifact: saved here, loaded in a fresh process

# %%
FRESH = """
import sys
sys.path.insert(0, sys.argv[2])
import torch, torchspan
from precompile_walkthrough import build
model = build()
fast = torchspan.load(sys.argv[1], model)
x = torch.ones(4, 8)
assert torch.allclose(fast(x), model(x), atol=1e-5)
print("== fresh process: equal to eager; dynamo was imported:", "torch._dynamo" in sys.modules)
"""


def show_artifact() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from precompile_walkthrough import build as build_it  # as the fresh process will name it, not as a part of __main__

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tspan"
        artifact = torchspan.precompile(build_it(), (torch.randn(4, 8),))
        artifact.save(path)
        print(f"== saved {', '.join(sorted(artifact.payloads))}")
        subprocess.run([sys.executable, "-c", FRESH, str(path), str(Path(__file__).parent)], check=True)


# %%
if __name__ == "__main__":
    show_capture()
    show_artifact()
