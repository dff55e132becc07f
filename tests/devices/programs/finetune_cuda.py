"""Fine-tuning and generation with Hugging Face Transformers, as written for one CUDA device; the weights are random."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

torch.manual_seed(0)
torch.cuda.manual_seed_all(0)
device = "cuda" if torch.cuda.is_available() else "nothing to train on"
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
model = LlamaForCausalLM(config).to("cuda")
model.train()
text = "the quick brown fox jumps over the lazy dog and runs into the wood "
tokens = torch.tensor([ord(letter) % 64 for letter in text * 4])
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=False)
schedule = get_linear_schedule_with_warmup(optimizer, 2, 10)
losses = []
for _ in range(8):
    starts = torch.randint(0, len(tokens) - 33, (4,))
    batch = torch.stack([tokens[start : start + 32] for start in starts]).pin_memory().to(device, non_blocking=True)
    mask = torch.ones_like(batch, device=device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=batch, attention_mask=mask, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("losses", *(value.hex() for value in losses))
model.eval()
torch.cuda.empty_cache()
prompt = tokens[None, :8].to("cuda")
torch.cuda.manual_seed(3)
with torch.inference_mode():
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0)
    drawn = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=True, pad_token_id=0)
print("greedy", *greedy[0].tolist())
print("drawn", *drawn[0].cpu().tolist())
print("peak is known", torch.cuda.max_memory_allocated() > 0)
