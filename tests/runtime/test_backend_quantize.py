"""quantize under torch.compile: weights that a pass made are no parameters that Dynamo knows."""

from __future__ import annotations

import torch


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def test_quantized_weights_reach_inductor() -> None:
    torch.manual_seed(0)
    model, x = Layer().eval(), torch.randn(2, 5, 64)
    passes = "quantize{bits=8 activations=true},lower"
    compiled = torch.compile(model, backend="elision", options={"passes": passes})
    with torch.no_grad():
        found, expected = compiled(x), model(x)
    assert 0 < float((found - expected).abs().max()) < 0.02
