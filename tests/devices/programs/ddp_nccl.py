"""Data-parallel training as it is written for torchrun on several CUDA devices of one machine."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group(backend="nccl")
rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(local_rank)
device = torch.device("cuda", local_rank)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 2)).to(
    device
)
model = DDP(model, device_ids=[local_rank], output_device=local_rank)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
inputs = torch.randn(64, 8)
dataset = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
sampler = DistributedSampler(dataset, shuffle=True, seed=3)
loader = DataLoader(dataset, batch_size=8, sampler=sampler, pin_memory=True)
losses = []
for epoch in range(3):
    sampler.set_epoch(epoch)
    for batch, label in loader:
        batch, label = batch.cuda(non_blocking=True), label.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch), label)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        losses.append((mean / dist.get_world_size()).item())
path = os.path.join(tempfile.gettempdir(), f"ddp-{os.environ['TORCHELASTIC_RUN_ID']}.pt")
if rank == 0:
    torch.save(model.state_dict(), path)
dist.barrier(device_ids=[local_rank])
state = torch.load(path, map_location={"cuda:0": f"cuda:{local_rank}"}, weights_only=True)
model.load_state_dict(state)
parts = [torch.zeros(2, device=device) for _ in range(dist.get_world_size())]
dist.all_gather(parts, model(torch.ones(2, 8, device=device))[0].detach())
assert torch.equal(parts[0], parts[-1])
dist.barrier()
if rank == 0:
    os.remove(path)
    print("losses", *(value.hex() for value in losses), *parts[0].tolist())
dist.destroy_process_group()
