"""A pass of one's own that adds an input: which samples of the batch are put out. Works on torch and ONNX graphs.

Run it: `python examples/own_input.py`. docs/own_pass.md walks through it.
"""

from dataclasses import dataclass

import numpy as np
from elision.passes import Graph, Outcome, Pass, PassContext, Refused, register
from elision.passes.base import same_examples


@register
class PickSamples(Pass):
    name = "pick-samples"
    summary = "an output for those samples of the batch that are asked for"
    exact = True

    @dataclass(frozen=True)
    class Options:
        input: str = "samples"  # what the new input is called

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        value = graph.outputs[0]
        if not value.shape or value.producer is None:
            raise Refused(f"%{value.name} is an input, or has no axis of samples")
        samples = graph.add_input(self.options.input, "int64", ["picked"])
        picked = graph.insert_plain("gather", [value, samples], {"axis": 0}, after=value.producer)
        graph.replace_output(0, picked)
        # Checked by asking for all of them; without example inputs nothing is compared.
        count = len(context.example_inputs[0]) if context.example_inputs else 0
        added = {self.options.input: np.arange(count)}
        signature = same_examples(context, len(graph.outputs), added)
        return Outcome(
            changed=True, signature=signature, notes=[f"{self.options.input}: int64, numbers of samples"]
        )


if __name__ == "__main__":
    import torch

    import elision

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    x = torch.randn(5, 4)
    result = elision.optimize(model, "pick-samples", (x,))
    print(result.report.diff(0))
    print(result.report.passes[0].notes, result.report.passes[0].drift[0])
    print(result.module(x, torch.tensor([3, 0])))
