"""The three ways in with the real pass: they agree with each other, and the result trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.runtime.report import render
from torch import nn

import elision

from ..analysis import toys

PASSES = "token-merge{r=3}"


class Block(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, width = x.shape
        packed = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*packed.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """Images [B, 3, 32, 32] -> [B, 5], a class token before 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, stride=8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.blocks(x)[:, 0])


@pytest.fixture
def vision() -> Vision:
    return Vision().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32)


def test_the_ways_in_agree(vision, x, tmp_path):
    traced = elision.optimize(vision, PASSES, (x,), force=True)
    expected = traced.module(x)
    assert not torch.allclose(expected, vision(x), atol=1e-6)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(vision, backend="elision", options={"passes": PASSES, "force": True})
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
    path = tmp_path / "merged.onnx"
    elision.export_onnx(vision, (x,), path, PASSES, force=True)
    session = elision.session(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-3, atol=1e-4)
    traced.save(tmp_path / "merged.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "merged.pt2").module()(x), expected)


def test_r_0_is_the_model_itself(vision, x):
    with pytest.raises(elision.ElisionError):
        elision.optimize(vision, "token-merge{r=-1}", (x,))
    try:
        result = elision.optimize(vision, "token-merge{r=0}", (x,), force=True)
    except elision.Refused as error:
        assert "nothing to merge" in str(error)
    else:
        assert torch.equal(result.module(x), vision(x))


def test_a_merged_model_trains(vision, x):
    torch._dynamo.reset()
    vision.train()
    target = torch.randint(0, 5, (3,))
    step = torch.compile(vision, backend="elision", options={"passes": PASSES, "force": True})
    eager = elision.optimize(vision, PASSES, (x,), force=True).module
    gradients = []
    for run in (step, eager):
        vision.zero_grad()
        nn.functional.cross_entropy(run(x), target).backward()
        gradients.append([parameter.grad.clone() for parameter in vision.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    optimiser = torch.optim.SGD(vision.parameters(), 0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(step(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_dynamic_batch(vision):
    torch._dynamo.reset()
    compiled = torch.compile(vision, backend="elision", options={"passes": PASSES, "force": True})
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = torch.rand(batch, 3, 32, 32)
            torch._dynamo.mark_dynamic(x, 0)
            alone = torch.cat([compiled(image[None].expand(2, -1, -1, -1))[:1] for image in x])
            torch.testing.assert_close(compiled(x), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", ["torch", "onnx"])
def test_picture(vision, x, host, tmp_path):
    if host == "torch":
        result = elision.optimize(vision, PASSES, (x,), force=True, token_map=True)
    else:
        path = tmp_path / "m.onnx"
        result = elision.export_onnx(vision, (x,), path, PASSES, force=True, token_map=True)
    html = render(result, (x,))
    assert html.count("data:image/png") == 6
    assert "16 patches became 7 tokens" in html  # three merges of three


def test_a_learned_bias_exports_and_keeps_its_gradients(tmp_path):
    """torch.onnx.export stops at an attention whose mask asks for gradients."""
    module, inputs = toys.Text().eval(), toys.text_inputs()
    elision.export_onnx(module, inputs, tmp_path / "text.onnx", "token-merge{r=2}", force=True)
    assert all(p.requires_grad for p in module.parameters())
