"""SyncBatchNorm on CUDA over two ranks, beside the batch normalisation of the two batches as one."""

import torch
import torch.distributed as dist

dist.init_process_group("nccl")
rank = dist.get_rank()
torch.manual_seed(0)
whole = torch.randn(7, 3, 5)
sizes = [4, 3]
model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3)).to(f"cuda:{rank}")
reference = torch.nn.BatchNorm1d(3)
mine = whole.split(sizes)[rank].cuda().requires_grad_()
whole.requires_grad_()
weights = torch.randn(7, 3, 5)
expected = reference(whole)
(expected * weights).sum().backward()
found = model(mine)
(found * weights.split(sizes)[rank]).sum().backward()
torch.testing.assert_close(found, expected.split(sizes)[rank])
torch.testing.assert_close(mine.grad, whole.grad.split(sizes)[rank])
grad = model.weight.grad.clone()
dist.all_reduce(grad)
torch.testing.assert_close(grad, reference.weight.grad)
torch.testing.assert_close(model.running_mean, reference.running_mean)
torch.testing.assert_close(model.running_var, reference.running_var)
model.eval(), reference.eval()
torch.testing.assert_close(model(mine), reference(whole).split(sizes)[rank])
dist.destroy_process_group()
print("right")
