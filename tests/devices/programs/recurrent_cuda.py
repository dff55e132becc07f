"""A recurrent network over packed sequences, with the device as the default one."""

import sys

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
torch.manual_seed(5)
sequences, lengths = torch.randn(4, 7, 6), torch.tensor([7, 5, 3, 2])
network, head = torch.nn.RNN(6, 8, batch_first=True), torch.nn.Linear(8, 1)
torch.set_default_device(device)
network, head = network.to(device), head.to(device)
optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
target = torch.zeros(4, 7, 1)
losses = []
for _ in range(4):
    packed = pack_padded_sequence(sequences.to(device), lengths, batch_first=True)
    out, _ = pad_packed_sequence(network(packed)[0], batch_first=True)
    loss = torch.nn.functional.mse_loss(head(out), target + 1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("losses", *(value.hex() for value in losses))
