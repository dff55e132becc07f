"""A small GPT trainer ported to the CPU by hand."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

device = "cpu"
torch.manual_seed(1337)
WIDTH, HEADS, CONTEXT, VOCABULARY = 32, 4, 16, 23


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))
        self.register_buffer("mask", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(self.mask == 0, float("-inf"))
        x = x + self.out((F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], dtype=torch.long, device=tokens.device)
        noise = 0.01 * torch.randn(WIDTH, device="cpu")
        return self.head(self.blocks(self.tokens(tokens) + self.positions(positions) + noise))


data = torch.randint(VOCABULARY, (48, CONTEXT + 1))
model = GPT().to(device)
assert model.cpu() is model
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
loader = DataLoader(TensorDataset(data), batch_size=8, shuffle=True)
losses = []
for epoch in range(3):
    for (batch,) in loader:
        batch = batch.to(device, non_blocking=True)
        dtype = [torch.bfloat16, torch.float32][epoch % 2]
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
best = {name: value.cpu() for name, value in model.state_dict().items()}
generator = torch.Generator(device="cpu").manual_seed(7)
tokens = torch.zeros((1, 1), dtype=torch.long, device=device)
with torch.no_grad():
    for _ in range(CONTEXT - 1):
        padded = F.pad(tokens, (CONTEXT - tokens.shape[1], 0))
        tokens = torch.cat([tokens, torch.multinomial(model(padded)[:, -1].softmax(-1), 1, generator=generator)], 1)
print("losses", *(loss.hex() for loss in losses))
print("scale", scaler.get_scale(), "tokens", *tokens[0].tolist())
print("weights", sum(value.double().sum().item() for value in best.values()).hex())
