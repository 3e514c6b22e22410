"""torch.compile(backend="elision")."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import elision

from . import toys

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """No compiled code from other tests, in memory or on the disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, passes="toy-drop-relu", **options):
    return torch.compile(model, backend="elision", options={"passes": passes, **options})


def test_found_through_the_entry_point():
    code = "import torch, sys; print('elision' in torch._dynamo.list_backends(), 'elision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("passes", ["toy-drop-relu", [toys.DropRelu()], toys.DropRelu(times=1)])
def test_passes_as_text_and_objects(model, passes):
    torch.testing.assert_close(compiled(model, passes)(X), toys.without_relus(model, X, 1))


def test_without_passes_it_is_inductor(model, monkeypatch):
    from elision.runtime import backend

    def never(*_args, **_kwargs):
        raise AssertionError("no pass was asked for")

    monkeypatch.setattr(backend, "run_passes", never)
    monkeypatch.setattr(backend, "cache_key", never)
    for options in (None, {"passes": ""}, {"passes": None}, {"epilogue_fusion": False}):
        torch._dynamo.reset()
        ours = torch.compile(model, backend="elision", options=options)(X)
        torch._dynamo.reset()
        theirs = torch.compile(model, backend="inductor")(X)
        assert torch.equal(ours, theirs)


def test_mode_and_options_reach_inductor(model, monkeypatch):
    from elision.runtime import backend

    seen = []
    real = torch._TorchCompileInductorWrapper.__call__

    def spy(self, gm, inputs, **extra):
        seen.append({**self.config, **extra.get("config_patches", {})})
        return real(self, gm, inputs, **extra)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", spy)
    compiled(model, **{"epilogue_fusion": False})(X)
    assert seen[0]["epilogue_fusion"] is False
    assert isinstance(seen[0]["post_grad_custom_pre_pass"], backend.CacheKey)
    torch._dynamo.reset()
    torch.compile(model, backend="elision", mode="reduce-overhead")(X)
    assert seen[1]["triton.cudagraphs"] is True


def gradients(model, step, target):
    model.zero_grad()
    ((step(X) - target) ** 2).mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_training(model):
    model.train()
    target = torch.randn(4, 4)
    found = gradients(model, compiled(model), target)
    expected = gradients(model, lambda x: toys.without_relus(model, x, 1), target)
    torch.testing.assert_close(found, expected)


def test_dynamic_shapes_compile_once(model):
    from elision.runtime import backend

    before = len(backend.reports)
    step = torch.compile(model, backend="elision", options={"passes": "toy-drop-relu"}, dynamic=True)
    for batch in (3, 5, 9):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(step(x), toys.without_relus(model, x, 1))
    assert len(backend.reports) == before + 1


def test_different_pipelines_never_share_code(model):
    """Dynamo: one model under two pipelines at once. Inductor: again from the disk, in a fresh Dynamo."""
    texts = ["toy-drop-relu{times=1}", "toy-drop-relu{times=2}", "toy-drop-relu{times=3}"]
    steps = [compiled(model, text) for text in texts]
    with torch.no_grad():
        for times, step in enumerate(steps, 1):
            torch.testing.assert_close(step(X), toys.without_relus(model, X, times))
        # The second and third make the same graph: the key alone tells them apart.
        assert counters["aot_autograd"]["autograd_cache_miss"] == 3
        assert counters["aot_autograd"]["autograd_cache_hit"] == 0
        for times, text in enumerate(texts, 1):
            torch._dynamo.reset()
            torch.testing.assert_close(compiled(model, text)(X), toys.without_relus(model, X, times))
        assert counters["aot_autograd"]["autograd_cache_hit"] == 3


def test_cache_key_tells_options_and_versions_apart(monkeypatch):
    from elision.passes.pipeline import parse
    from elision.runtime import backend

    def key(text, force=False):
        patch = backend.cache_key(parse(text), {"force": force}, {})
        return patch["post_grad_custom_pre_pass"].uuid()

    keys = [key("toy-drop-relu"), key("toy-drop-relu{times=2}"), key("toy-crash"), key("toy-drop-relu", True)]
    assert len(set(keys)) == 4
    assert key("toy-drop-relu") == key("toy-drop-relu{times=1}")  # the default, written out
    monkeypatch.setattr(backend, "sources_digest", lambda: "another version")
    assert key("toy-drop-relu") not in keys


def test_a_pass_of_the_user_in_inductor_is_kept(model):
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Mine(CustomGraphPass):
        calls = 0

        def __call__(self, graph):
            Mine.calls += 1

        def uuid(self):
            return "mine"

    compiled(model, post_grad_custom_pre_pass=Mine())(X)
    assert Mine.calls > 0


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"passes": "toy-drop-rleu"}, elision.PipelineError, "toy-drop-relu"),
        ({"passes": "toy-drop-relu{tmies=2}"}, elision.PipelineError, "times"),
        ({"passes": "toy-drop-relu{times=-1}"}, elision.Refused, "cannot put relus back"),
        ({"pases": "toy-drop-relu"}, elision.PipelineError, "did you mean 'passes'"),
        ({"passes": "toy-drop-relu", "force": "yes"}, elision.PipelineError, "force"),
        ({"passes": "toy-drop-relu", "max_autotune": "yes"}, elision.PipelineError, "max_autotune"),
        ({"passes": 3}, elision.PipelineError, "int"),
        ({"passes": "toy-crash"}, elision.ElisionError, "toy-crash"),
    ],
)
def test_errors_reach_the_user_as_they_are(model, options, kind, text):
    with pytest.raises(kind) as caught:
        torch.compile(model, backend="elision", options=options)(X)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_failing_pass_carries_its_reproducer(model):
    with pytest.raises(elision.ElisionError) as caught:
        compiled(model, "toy-crash")(X)
    assert caught.value.reproducer["failing_pass"] == "toy-crash"


def test_nothing_matched_in_a_whole_model():
    with pytest.raises(elision.NothingMatched, match="no relu"):
        compiled(nn.Linear(8, 8))(X)


class Broken(nn.Module):
    """Three graphs: one inside `first`, up to its break, one up to the second break, and the rest."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(8, 8), nn.Linear(8, 8), relu

    def stem(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return torch.sigmoid(x)

    def forward(self, x):
        x = self.second(self.stem(x)) * 2
        torch._dynamo.graph_break()
        x = x + 1
        return torch.relu(x) if self.relu else torch.tanh(x)


def test_fragments_without_a_match_are_warned_about_once():
    model = Broken(relu=True).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compiled(model)(X)
    assert len([w for w in caught if "compiled without toy-drop-relu" in str(w.message)]) == 1
    torch.testing.assert_close(found, model.second(model.stem(X)) * 2 + 1)


def test_a_broken_model_without_any_match_is_an_error():
    options = {"passes": "toy-drop-relu"}  # shared: another model's match must not count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(Broken(relu=True).eval(), backend="elision", options=options)(X)
        with pytest.raises(elision.NothingMatched, match="no relu"):
            torch.compile(Broken(relu=False).eval(), backend="elision", options=options)(X)


def test_inputs_keep_their_sources_and_static_marks(model):
    from elision.runtime import backend

    seen = []
    real = backend._as_dynamo_graph

    def spy(module, original):
        seen.append((original, real(module, original)))
        return seen[-1][1]

    backend._as_dynamo_graph = spy
    try:
        compiled(model)(X)
    finally:
        backend._as_dynamo_graph = real
    original, module = seen[0]
    for old, new in zip(
        original.graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder")
    ):
        assert new._dynamo_source == old._dynamo_source
        assert new.meta.get("tensor_dict") == old.meta.get("tensor_dict")
