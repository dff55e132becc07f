"""Train a small GPT on characters, and let it write.

Needs PyTorch 2.10 or newer and one CUDA device.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.traceback import annotate
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--context", type=int, default=64)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--sample", type=int, default=300, help="characters to write at the end")
args = parser.parse_args()

device = "cuda"
torch.manual_seed(1337)
torch.cuda.manual_seed_all(1337)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.benchmark = True

text = Path(__file__).with_name("corpus.txt").read_text()
alphabet = sorted(set(text))
codes = {character: code for code, character in enumerate(alphabet)}
data = torch.tensor([codes[character] for character in text])


class Windows(Dataset):
    """Windows of the text, and the same windows one character later."""

    def __len__(self):
        return len(data) - args.context - 1

    def __getitem__(self, start):
        window = data[start : start + args.context + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(args.width), nn.LayerNorm(args.width)
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.out = nn.Linear(args.width, args.width, bias=False)
        self.up = nn.Linear(args.width, 4 * args.width)
        self.down = nn.Linear(4 * args.width, args.width)

    def forward(self, x):
        batch, length, width = x.shape
        with annotate({"part": "attention"}):
            q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, args.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        with annotate({"part": "mlp"}):
            return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(len(alphabet), args.width)
        self.positions = nn.Embedding(args.context, args.width)
        self.blocks = nn.ModuleList(checkpoint_wrapper(Block(), early_stop=True) for _ in range(args.layers))
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, len(alphabet), bias=False)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device="cuda")
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


torch.set_default_device("cuda")
model = GPT().cuda()
torch.set_default_device(None)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
scaler = torch.amp.GradScaler("cuda", enabled=True)
compiled = torch.compile(model)
shuffle = torch.Generator().manual_seed(1337)
loader = DataLoader(Windows(), batch_size=args.batch, shuffle=True, generator=shuffle, pin_memory=True, drop_last=True)
copies = torch.cuda.Stream()
begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {torch.cuda.get_device_name(0)}")
begin.record()
started = time.perf_counter()
for step, (inputs, targets) in zip(range(1, args.steps + 1), loader):
    with torch.cuda.stream(copies):
        inputs, targets = inputs.to(device, non_blocking=True), targets.cuda(non_blocking=True)
    torch.cuda.current_stream().wait_stream(copies)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * min(1.0, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = compiled(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    if step == 1 or step % 100 == 0 or step == args.steps:
        torch.cuda.synchronize()
        print(f"step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - started:6.1f} s", flush=True)
end.record()
torch.cuda.synchronize()
print(f"{begin.elapsed_time(end) / args.steps:.1f} ms a step, {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most")

model.eval()
tokens = torch.tensor([[codes["\n"]]], device="cuda")
with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
    for _ in range(args.sample):
        logits = model(tokens[:, -args.context :])[:, -1].float()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
print("".join(alphabet[code] for code in tokens[0].tolist()))
