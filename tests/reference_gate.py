"""MrT5's delete gate on a T5, written from the paper's equations (Kallini et al., ICLR 2025), eagerly.

One sample at a time: deleted tokens are taken out of the sequence for good, so that nothing here knows of padding,
slots or sizes. Only the weights are the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """weight [C], bias [1]; `last` tokens always stay, and those of the ids in `special`. `capacity`: the share of a
    sample's tokens that there is room for, 1 for no limit."""

    weight: Tensor
    bias: Tensor
    layer: int
    k: float = -30.0
    threshold: float = -15.0
    last: int = 1
    capacity: float = 1.0
    softmax1: bool = False
    special: tuple[int, ...] = ()

    def values(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """G = k * sigmoid(-z), z linear in the RMS-normed hidden states [n, C]; 0 for those that stay (ids [n])."""
        normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        gate = self.k * torch.sigmoid(-(normed @ self.weight + self.bias))
        if self.last:
            gate = torch.cat([gate[: -self.last], torch.zeros(min(self.last, len(gate)))])
        if self.special and ids is not None:
            gate = gate.masked_fill(torch.isin(ids, torch.tensor(self.special)), 0.0)
        return gate

    def kept(self, gate: Tensor) -> Tensor:
        """The places that stay, in order."""
        room = -int(-len(gate) * self.capacity // 1)  # rounded up
        last = min(self.last, len(gate))
        free = [i for i in range(len(gate) - last) if gate[i] > self.threshold]
        free = sorted(free, key=lambda i: -float(gate[i]))[: max(room - last, 0)]
        return torch.tensor([*sorted(free), *range(len(gate) - last, len(gate))])


def rms(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def attend(part: Any, x: Tensor, context: Tensor, bias: Tensor, *, softmax1: bool = False) -> Tensor:
    """x [n, C], context [m, C], bias [heads, n, m] -> [n, C]; no scale, as T5 has none."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (part.n_heads, -1)).transpose(0, 1)

    scores = heads(part.q(x)) @ heads(part.k(context)).transpose(1, 2) + bias
    chances = scores.exp() / (scores.exp().sum(-1, keepdim=True) + float(softmax1))
    return part.o((chances @ heads(part.v(context))).transpose(0, 1).flatten(1))


def encode(model: Any, ids: Tensor, gate: Gate, *, hard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ids [n] -> memory [n or fewer, C], the bias of each of its keys, and the gate [n]."""
    stack = model.encoder
    x = model.shared(ids)
    position = stack.block[0].layer[0].SelfAttention.compute_bias(len(ids), len(ids))[0]
    added, values = torch.zeros(len(ids)), torch.zeros(len(ids))
    for index, block in enumerate(stack.block):
        if index == gate.layer:
            values = gate.values(x, ids)
            if hard:
                keep = gate.kept(values)
                x, position, added = x[keep], position[:, keep][:, :, keep], added[keep]
            else:
                added = values
        own, feed = block.layer[0], block.layer[1]
        normed = rms(x, own.layer_norm)
        after = index >= gate.layer
        x = x + attend(own.SelfAttention, normed, normed, position + added, softmax1=gate.softmax1 and after)
        x = x + feed.DenseReluDense.wo(feed.DenseReluDense.wi(rms(x, feed.layer_norm)).relu())
    return rms(x, stack.final_layer_norm), added, values


def decode(model: Any, ids: Tensor, memory: Tensor, added: Tensor, *, softmax1: bool) -> Tensor:
    """ids [m] of the decoder -> logits [m, V]."""
    stack, n = model.decoder, len(ids)
    x = model.shared(ids)
    position = stack.block[0].layer[0].SelfAttention.compute_bias(n, n)[0]
    position = position + torch.full((n, n), -torch.inf).triu(1)
    for block in stack.block:
        own, cross, feed = block.layer
        normed = rms(x, own.layer_norm)
        x = x + attend(own.SelfAttention, normed, normed, position)
        normed = rms(x, cross.layer_norm)
        x = x + attend(
            cross.EncDecAttention, normed, memory, added.expand(1, n, len(memory)), softmax1=softmax1
        )
        x = x + feed.DenseReluDense.wo(feed.DenseReluDense.wi(rms(x, feed.layer_norm)).relu())
    x = rms(x, stack.final_layer_norm)
    if model.config.scale_decoder_outputs:
        x = x * model.config.d_model**-0.5
    return model.lm_head(x)


def run(
    model: Any, ids: Tensor, mask: Tensor, decoder_ids: Tensor, gate: Gate, *, hard: bool
) -> tuple[Tensor, Tensor]:
    """ids, mask [B, N], decoder_ids [B, M] -> logits [B, M, V] and gates [B, N] (k for padding)."""
    logits, gates = [], []
    for row, real, target in zip(ids, mask, decoder_ids):
        memory, added, values = encode(model, row[real > 0], gate, hard=hard)
        logits.append(decode(model, target, memory, added, softmax1=gate.softmax1))
        gates.append(torch.full((len(row),), gate.k).masked_scatter(real > 0, values))
    return torch.stack(logits), torch.stack(gates)
