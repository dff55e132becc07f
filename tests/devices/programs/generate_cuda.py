"""Decoding with a cache of keys and values, greedy and by top-k, from indices, masks and a softmax on the device."""

import sys

import torch
import torch.nn.functional as F

device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
torch.manual_seed(11)
WIDTH, HEADS, VOCABULARY, LONGEST = 16, 2, 29, 12
embed, head = torch.nn.Embedding(VOCABULARY, WIDTH).to(device), torch.nn.Linear(WIDTH, VOCABULARY).to(device)
qkv = torch.nn.Linear(WIDTH, 3 * WIDTH).to(device)
cache = torch.zeros(2, 1, HEADS, LONGEST, WIDTH // HEADS, device=device)
causal = torch.tril(torch.ones(LONGEST, LONGEST, dtype=torch.bool, device=device))


@torch.inference_mode()
def logits(token, position):
    q, k, v = qkv(embed(token)).view(1, 1, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
    mask = causal[position][None, None, None]
    out = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
    return head(out.transpose(1, 2).flatten(2))[0, -1]


token = torch.tensor([[1]], device=device)
tokens = []
for position in range(LONGEST):
    scores = logits(token, torch.tensor(position, device=device))
    best, index = torch.topk(scores, 5)
    choice = index[torch.argmax(F.softmax(best / 0.8, dim=-1))] if position % 2 else scores.argmax()
    token = choice.view(1, 1)
    tokens.append(choice.item())
print("greedy", *tokens, scores.float().logsumexp(0).item().hex())
