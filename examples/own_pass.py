"""A pass of one's own: drop a pair of transposes that undo each other. Works on torch and ONNX graphs.

Run it: `python examples/own_pass.py`. docs/own_pass.md walks through it.
"""

from dataclasses import dataclass

from elision.passes import Graph, NothingMatched, Outcome, Pass, PassContext, register


@register
class DropTransposes(Pass):
    name = "drop-transposes"
    summary = "removes pairs of transposes that undo each other"
    exact = True  # the manager compares outputs before and after, and fails the pass if they differ

    @dataclass(frozen=True)
    class Options:
        limit: int | None = None  # at most so many pairs

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        removed = 0
        for second in graph.ops_of("transpose"):
            first = second.inputs[0].producer
            if first is None or first.kind != "transpose" or removed == self.options.limit:
                continue
            if any(first.attrs["perm"][p] != axis for axis, p in enumerate(second.attrs["perm"])):
                continue
            for user, index in list(second.output.users):
                graph.set_operand(user, index, first.inputs[0])
            for index, value in enumerate(graph.outputs):
                if value is second.output:
                    graph.replace_output(index, first.inputs[0])
            removed += 1
        if not removed:
            raise NothingMatched("no two transposes in a row undo each other")
        graph.remove_dead()
        return Outcome(changed=True, statistics={"pairs": removed})


if __name__ == "__main__":
    import torch
    from elision.passes.testing import capture, report

    class Model(torch.nn.Module):
        def forward(self, x):
            return x.transpose(1, 2).transpose(2, 1).relu()

    x = torch.randn(2, 3, 4)
    result = report(capture(Model(), (x,)), "drop-transposes", (x,))
    print(result.diff(0))
    print(result.passes[0].statistics, result.passes[0].drift[0])
