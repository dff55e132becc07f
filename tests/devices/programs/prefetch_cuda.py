"""Batches are copied ahead in a stream of their own, as input pipelines for CUDA do."""

import sys

import torch

device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
batches = [torch.randn(8, 16) for _ in range(6)]
copies = torch.cuda.Stream() if device == "cuda" else None
losses = []


def ahead(batch):
    if copies is None:
        return batch
    with torch.cuda.stream(copies):
        return batch.pin_memory().to(device, non_blocking=True)


following = ahead(batches[0])
for step in range(len(batches)):
    if copies is not None:
        torch.cuda.current_stream().wait_stream(copies)
        following.record_stream(torch.cuda.current_stream())
    batch = following
    if step + 1 < len(batches):
        following = ahead(batches[step + 1])
    loss = model(batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
print("losses", *(value.hex() for value in losses))
