"""Collectives as they are written for NCCL, in a rank of two whose accelerator is the device "second"."""

import os

import torch
import torch.distributed as dist

dist.init_process_group("nccl")
rank = dist.get_rank()
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mine = torch.full((4,), float(rank + 1), device="cuda")
assert mine.device.type == "second"

total = mine.clone()
work = dist.all_reduce(total, async_op=True)
work.wait()
assert total.tolist() == [3.0] * 4
first = mine.clone()
dist.broadcast(first, 0)
assert first.tolist() == [1.0] * 4
parts = [torch.zeros(4, device="cuda") for _ in range(2)]
dist.all_gather(parts, mine)
assert [part[0].item() for part in parts] == [1.0, 2.0]
whole = torch.zeros(8, device="cuda")
dist.all_gather_into_tensor(whole, mine)
assert whole.tolist() == [1.0] * 4 + [2.0] * 4
share = torch.zeros(4, device="cuda")
dist.reduce_scatter_tensor(share, whole)
assert share.tolist() == [2.0 * (rank + 1)] * 4
swapped = torch.zeros(4, device="cuda")
dist.all_to_all_single(swapped, mine)
assert swapped.tolist() == [1.0, 1.0, 2.0, 2.0]
if rank == 0:
    dist.send(mine, 1)
else:
    actual = torch.zeros(4, device="cuda")
    dist.recv(actual, 0)
    assert actual.tolist() == [1.0] * 4
message = [None, None]
dist.all_gather_object(message, {"rank": rank})
assert message == [{"rank": 0}, {"rank": 1}]
on_cpu = torch.ones(2)
dist.all_reduce(on_cpu)
assert on_cpu.tolist() == [2.0, 2.0]
dist.barrier(device_ids=[rank])

torch.manual_seed(0)
alone = torch.nn.Linear(3, 1).cuda()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1).cuda(), device_ids=[torch.cuda.current_device()])
model.module.load_state_dict(alone.state_dict())
batch = torch.arange(12.0, device="cuda").view(4, 3)
model(batch[rank::2]).sum().backward()
(alone(batch).sum() / 2).backward()
assert torch.equal(model.module.weight.grad, alone.weight.grad)
dist.destroy_process_group()
print("right", flush=True)
