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
my_weights = weights.split(sizes)[rank].cuda()
expected = reference(whole)
(expected * weights).sum().backward()
output = model(mine)
(output * my_weights).sum().backward()
torch.testing.assert_close(output.cpu(), expected.split(sizes)[rank])
torch.testing.assert_close(mine.grad.cpu(), whole.grad.split(sizes)[rank])
grad = model.weight.grad.clone()
dist.all_reduce(grad)
torch.testing.assert_close(grad.cpu(), reference.weight.grad)
torch.testing.assert_close(model.running_mean.cpu(), reference.running_mean)
torch.testing.assert_close(model.running_var.cpu(), reference.running_var)
model.eval(), reference.eval()
torch.testing.assert_close(model(mine).cpu(), reference(whole).split(sizes)[rank])
dist.destroy_process_group()
print("right")
