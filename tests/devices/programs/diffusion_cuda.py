"""A small denoising diffusion model, trained and sampled as it is written for one CUDA device."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

device = torch.device("cuda")
torch.manual_seed(0)
torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")
STEPS, SIZE = 20, 8


class Denoiser(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.time = nn.Embedding(STEPS, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.GroupNorm(4, width) for _ in range(2)])
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t):
        h = self.first(x) + self.time(t)[:, :, None, None]
        for conv, norm in zip(self.middle, self.norms):
            h = h + conv(F.silu(norm(h)))
        return self.last(F.silu(h))


betas = torch.linspace(1e-4, 0.2, STEPS, device=device)
alphas = torch.cumprod(1 - betas, dim=0)
model = Denoiser().to(device, memory_format=torch.channels_last)
average = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scaler = torch.cuda.amp.GradScaler(enabled=False)
generator = torch.Generator(device="cuda").manual_seed(1)
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
losses, milliseconds = [], []
for _ in range(12):
    images = torch.rand(16, 1, SIZE, SIZE, generator=generator, device=device).to(memory_format=torch.channels_last)
    t = torch.randint(0, STEPS, (16,), generator=generator, device="cuda")
    noise = torch.randn(images.shape, generator=generator, device="cuda")
    start.record()
    noisy = alphas[t].sqrt()[:, None, None, None] * images + (1 - alphas[t]).sqrt()[:, None, None, None] * noise
    with torch.autocast("cuda", dtype=torch.bfloat16):
        predicted = model(noisy, t)
    loss = F.mse_loss(predicted.float(), noise)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    end.record()
    end.synchronize()
    milliseconds.append(start.elapsed_time(end))
    with torch.no_grad():
        for mean, value in zip(average.parameters(), model.parameters()):
            mean.lerp_(value, 0.1)
    losses.append(loss.item())
assert all(value > 0 for value in milliseconds)
print("losses", *(value.hex() for value in losses))


@torch.inference_mode()
def sample(count):
    draws = torch.Generator("cuda")
    draws.manual_seed(2)
    x = torch.randn(count, 1, SIZE, SIZE, generator=draws, device="cuda")
    for t in reversed(range(STEPS)):
        noise = average(x, torch.full((count,), t, device="cuda"))
        x = (x - betas[t] / (1 - alphas[t]).sqrt() * noise) / (1 - betas[t]).sqrt()
        if t:
            x += betas[t].sqrt() * torch.randn(x.shape, generator=draws, device="cuda")
    return x.clamp(-1, 1).cpu()


with torch.cuda.stream(torch.cuda.Stream()):
    images = sample(2)
torch.cuda.synchronize()
torch.cuda.empty_cache()
print("sample", *(value.hex() for value in images.flatten().tolist()[:20]))
