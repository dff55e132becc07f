"""Ranks train one model by DDP with an artifact: rank 0 compiles it and sends it to the others, which trace and compile nothing.

torchrun --nproc_per_node=2 examples/artifact_on_ranks.py
"""

import copy
import io

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchspan

LENGTH, WIDTH, STEPS = 16, 32, 5  # L, D


class Residual(nn.Module):
    """Two linear layers beside the identity, after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_LD: Tensor) -> Tensor:
        """The same shape."""
        return x_LD + self.down(F.gelu(self.up(self.norm(x_LD))))


class Loaded(nn.Module):
    """A model whose forward and backward are an artifact's; its parameters are the model's."""

    def __init__(self, model: nn.Module, artifact: bytes) -> None:
        super().__init__()
        self.model = model
        self._call = torchspan.load(io.BytesIO(artifact), model)

    def forward(self, x_LD: Tensor) -> Tensor:
        """What the model does."""
        return self._call(x_LD)


def artifact_of(model: nn.Module) -> bytes:
    """What rank 0 compiles, on every rank."""
    file = io.BytesIO()
    if dist.get_rank() == 0:
        torchspan.precompile(model, (torch.randn(LENGTH, WIDTH),)).save(file)
    held = [file.getvalue()]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def train(model: nn.Module) -> list[float]:
    """Losses of this rank; each has other data, and gradients are the means over the ranks."""
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        loss = parallel(torch.randn(LENGTH, WIDTH, generator=data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train with the artifact, then eagerly, and say how far apart the two are."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Residual()
    eager = copy.deepcopy(model)
    losses = train(Loaded(model, artifact_of(model)))
    expected = train(eager)
    weights = zip(model.parameters(), eager.parameters(), strict=True)
    furthest = max((mine - other).abs().max().item() for mine, other in weights)
    said = f"losses {losses[0]:.6f} to {losses[-1]:.6f}, eagerly {expected[0]:.6f} to {expected[-1]:.6f}"
    print(f"rank {dist.get_rank()}: {said}; weights differ by at most {furthest:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
