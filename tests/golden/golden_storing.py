"""The model behind the golden artifacts of format 3, which a call stores on; it stays as it is: manifests hold its code."""

import torch
from torch import nn


class Storing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0).detach()
        return self.last(x - self.mean)


def build() -> Storing:
    torch.manual_seed(0)
    return Storing()
