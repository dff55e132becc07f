"""Activations are computed again in backward, weights are averaged, and a checkpoint is written, read and gone on from."""

import copy
import io
import sys

import torch
from torch.utils.checkpoint import checkpoint

device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
torch.manual_seed(7)
blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.SiLU()) for _ in range(3)).to(device)
average = copy.deepcopy(blocks)
optimizer = torch.optim.Adam(blocks.parameters(), lr=1e-2)
data = torch.randn(5, 8, 12)
losses = []


def step(x):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    loss = x.float().pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for mean, new in zip(average.parameters(), blocks.parameters()):
            mean.lerp_(new, 0.1)
    losses.append(loss.item())


for x in data[:3]:
    step(x.to(device))
file = io.BytesIO()
torch.save({"model": blocks.state_dict(), "optimizer": optimizer.state_dict()}, file)
step(data[3].to(device))
file.seek(0)
state = torch.load(file, map_location=device)
blocks.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
step(data[3].to(device))
assert losses[-1] == losses[-2]
step(data[4].to(device))
total = torch.zeros((), device=device)
for parameter in average.parameters():
    total += parameter.abs().sum()
print("losses", *(value.hex() for value in losses), total.item().hex())
