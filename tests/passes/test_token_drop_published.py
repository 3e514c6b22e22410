"""The published rules of token dropping: what is kept and merged, against eager references of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import reference_drop as reference
from tests.kernels.cases import call as call_op
from tests.zoo.model import Built
from tests.zoo.vlm import VLMS
from tests.zoo.vlm_inputs import ORIGINAL

from .drop_models import CLOSE, call_of, dropped, flags_of, gone_in, hidden, image_tokens, module_of, run

RATE = 0.25


def tower_layers(module: nn.Module) -> list[nn.Module]:
    return list(module.get_submodule("inner.model.vision_tower.encoder.layers").children())


def watched(module: nn.Module, args: tuple[Tensor, ...], **parts: nn.Module) -> dict[str, Tensor]:
    """What the parts put out in one call."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            found[name] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    run(module, args)
    for handle in handles:
        handle.remove()
    return found


def split(x: Tensor, heads: int = 4) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def tower(call: Built, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of an eager tower's block: the class token's attention to the patches [T, P], the patches' keys (mean over the
    heads) [T, P, d], and the patches behind the block [T, P, C]."""
    block = tower_layers(call.module)[layer]
    q, k = (block.get_submodule(f"self_attn.{name}_proj") for name in "qk")
    seen = watched(call.module, call.args, q=q, k=k, out=block)
    queries, keys = split(seen["q"]), split(seen["k"])
    row = reference.class_row(queries, keys)
    return row[:, 1:], keys.mean(1)[:, 1:], seen["out"][:, 1:]


def kept_patches(name: str, out: Tensor, args: tuple[Tensor, ...]) -> Tensor:
    """Which patches are left, bool [B, P], by the rows of a restored output."""
    inside = image_tokens(name, args)
    return (~gone_in(out))[inside].unflatten(0, (len(out), -1))


# ---- HiRED -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rate", [0.25, 0.4])
def test_hired_of_one_picture(rate: float) -> None:
    call = call_of("llava_batch", 3)
    row = tower(call, 2)[0]
    own = torch.cat([reference.hired_published_15(r[None], rate) for r in row])
    shared = reference.hired_published_15(row, rate)
    assert not torch.equal(own, shared)
    for options, expected in (({}, own), ({"compat": "reference"}, shared)):
        graph, _ = dropped("llava_batch", policy="hired", budget=rate, **options)
        assert torch.equal(kept_patches("llava_batch", run(graph, call.args), call.args), expected)


def in_text(kept: Tensor) -> Tensor:
    """Patches [T, P] of the tiles of one llava_next image -> its tokens, newlines kept, as the model packs them."""
    model = module_of("llava_next").get_submodule("inner.model")
    sizes, newline = torch.tensor([ORIGINAL]), torch.ones(1)
    with torch.no_grad():
        packed = model.pack_image_features(  # type: ignore[operator]
            [kept.float()[..., None]], sizes, vision_feature_select_strategy="default", image_newline=newline
        )
    return packed[0][0].reshape(-1) > 0


@pytest.mark.parametrize(("rate", "alpha"), [(0.25, 0.5), (0.5, 0.3), (0.2, 0.5)])
@pytest.mark.parametrize("compat", ["ours", "reference"])
def test_hired_of_tiles(compat: str, rate: float, alpha: float) -> None:
    call = call_of("llava_next")
    first, last = tower(call, 0)[0].unflatten(0, (2, 5)), tower(call, 2)[0].unflatten(0, (2, 5))
    rule = reference.hired if compat == "ours" else reference.hired_published_next
    expected = torch.stack([rule(a[0], b, rate, alpha, (2, 2)) for a, b in zip(first, last)])
    graph, _ = dropped(
        "llava_next", policy="hired", budget=rate, tiles=5, grid=(2, 2), alpha=alpha, compat=compat
    )
    out, flags = flags_of(graph, call.args)
    assert torch.equal(flags[:, 1:] == 1, expected.flatten(0, 1))
    if compat == "ours":
        assert expected.sum((1, 2)).tolist() == [int(80 * rate)] * 2
    assert torch.equal(
        kept_patches("llava_next", out, call.args), torch.stack([in_text(image) for image in expected])
    )
    gone = gone_in(out)
    torch.testing.assert_close(out[~gone], hidden(call, gone)[~gone], **CLOSE)


# ---- FastV -----------------------------------------------------------------------------------------------
@cache
def eager_llava() -> nn.Module:
    module = copy.deepcopy(module_of("llava_batch"))
    module.get_submodule("inner.model.language_model").set_attn_implementation("eager")  # type: ignore[operator]
    return module


def eager_fastv(args: tuple[Tensor, ...], layer: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Logits of an eager model in which dropped keys are hidden from block `layer` on, and what was dropped."""
    module = eager_llava()
    layers = list(module.get_submodule("inner.model.language_model.layers").children())
    inside = image_tokens("llava_batch", args)
    last = torch.stack([row.nonzero()[-1, 0] for row in args[1] > 0])
    gone: list[Tensor] = []

    def choose(_: nn.Module, __: Any, out: Any) -> None:
        rows = out[1].mean(1)[torch.arange(len(last)), last]
        kept = reference.fastv(rows[inside].unflatten(0, (len(last), -1)), ratio)
        mask = torch.zeros_like(inside)
        mask[inside] = ~kept.flatten()
        gone.append(mask)

    def hide(_: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_keys = gone[0][:, None, None, :]
        return given, {**named, "attention_mask": named["attention_mask"].masked_fill(hidden_keys, -1e30)}

    handles = [layers[layer - 1].get_submodule("self_attn").register_forward_hook(choose)]
    handles += [block.register_forward_pre_hook(hide, with_kwargs=True) for block in layers[layer:]]
    out = run(module, args)
    for handle in handles:
        handle.remove()
    return out, gone[0]


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (2, ""),
        (2, "right"),
        (1, ""),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in [(1, "right"), (2, "left")]),
    ],
)
def test_fastv(layer: int, side: str) -> None:
    call = call_of("llava_batch", 2, 1, side)
    graph, _ = dropped("llava_batch", 2, 1, side, policy="fastv", budget=RATE, layer=layer)
    out = run(graph, call.args)
    expected, gone = eager_fastv(call.args, layer, 1 - RATE)
    real = call.args[1] > 0
    assert gone.sum(1).tolist() == [48, 48] and not torch.equal(gone[0], gone[1])
    assert torch.equal(gone_in(out) & real, gone)
    torch.testing.assert_close(out[real & ~gone], expected[real & ~gone], **CLOSE)


def test_fastv_reads_the_last_token_of_each_text() -> None:
    call = call_of("llava_batch", side="right")
    mask = call.args[1].clone()
    mask[1, -7:] = 0  # of the second text three words less are left
    args = (call.args[0], mask, call.args[2])
    graph, _ = dropped("llava_batch", 2, 1, "right", policy="fastv", budget=RATE)
    out, (expected, gone) = run(graph, args), eager_fastv(args, 2, 1 - RATE)
    real = mask > 0
    assert torch.equal(gone_in(out) & real, gone)
    assert not torch.equal(gone[1], eager_fastv(call.args, 2, 1 - RATE)[1][1])
    torch.testing.assert_close(out[real & ~gone], expected[real & ~gone], **CLOSE)


# ---- VisionZip, PruMerge: the ops ------------------------------------------------------------------------
def random_tower(seed: int, patches: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    row = torch.rand(3, patches, generator=generator)
    keys, x = (torch.randn(3, patches, width, generator=generator) for width in (8, 6))
    return row, keys, x


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (4, 1), (0, 4), (10, 10), (17, 2)])
def test_contextual_tokens(seed: int, dominant: int, contextual: int) -> None:
    row, keys, x = random_tower(seed)
    zipped = reference.visionzip(row, keys, dominant, contextual)
    features = reference.visionzip_features(x, *zipped, mean=True)
    (flags,) = call_op("top_tokens", [row], {"count": dominant})
    slot, keep, source, new = call_op(
        "contextual_tokens", [keys, flags], {"count": contextual, "kept": dominant}
    )
    targets = torch.zeros_like(zipped.kept).scatter(1, zipped.targets, True)
    assert torch.equal(new == 1, zipped.kept | targets)
    merged = call_op("merge_tokens", [x, None, slot, keep, source], {"axis": 1, "batch_axis": 0})[0]
    for t in range(3):
        order = [*zipped.kept[t].nonzero()[:, 0].tolist(), *zipped.targets[t].tolist()]
        assert sorted(order) == keep[t].tolist()
        places = [keep[t].tolist().index(place) for place in order]
        torch.testing.assert_close(merged[t, places], features[t], atol=1e-5, rtol=1e-4)
        for token, home in enumerate(zipped.assigned[t].tolist()):
            if home >= 0:
                assert keep[t, int(slot[t, token])] == zipped.targets[t, home]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("keep", "neighbours"),
    [
        (5, 4),
        (20, 3),
        (7, 1),
        (3, 19),
        (1, 32),
    ],
)
def test_absorb_tokens(seed: int, keep: int, neighbours: int) -> None:
    row, keys, x = random_tower(seed)
    kept, expected = reference.prumerge(row, keys, x, keep, neighbours, mean=True)
    (flags,) = call_op("top_tokens", [row], {"count": keep})
    (found,) = call_op("absorb_tokens", [x, keys, row, flags], {"kept": keep, "neighbours": neighbours})
    assert torch.equal(flags == 1, kept)
    torch.testing.assert_close(found[kept], expected.flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert torch.equal(found[~kept], x[~kept])


# ---- and the whole of it ---------------------------------------------------------------------------------
def with_features(call: Built, merged: Tensor, gone: Tensor) -> Tensor:
    """The eager model to whose projector other features are given, and which sees no token that is gone."""
    projector = call.module.get_submodule("inner.model.multi_modal_projector")
    handle = projector.register_forward_pre_hook(lambda _, given: (merged, *given[1:]))
    out = hidden(call, gone)
    handle.remove()
    return out


def check_merging(policy: str, kept: Tensor, merged: Tensor, **options: Any) -> None:
    call = call_of("llava_batch")
    out = run(dropped("llava_batch", policy=policy, budget=RATE, **options)[0], call.args)
    gone = gone_in(out)
    assert torch.equal(kept_patches("llava_batch", out, call.args), kept)
    torch.testing.assert_close(out[~gone], with_features(call, merged, gone)[~gone], **CLOSE)
    assert not torch.allclose(out[~gone], hidden(call, gone)[~gone], atol=1e-2)


@pytest.mark.parametrize(("share", "contextual"), [(0.15, 2), (0.5, 8)])
def test_visionzip(share: float, contextual: int) -> None:
    row, keys, x = tower(call_of("llava_batch"), 2)
    zipped = reference.visionzip(row, keys, 16 - contextual, contextual)
    features = reference.visionzip_features(x, *zipped, mean=True)[:, -contextual:]
    merged = x.scatter(1, zipped.targets[..., None].expand_as(features), features)
    kept = zipped.kept.scatter(1, zipped.targets, True)
    check_merging("visionzip", kept, merged, contextual=share)


@pytest.mark.parametrize("neighbours", [4, 32])
def test_prumerge(neighbours: int) -> None:
    row, keys, x = tower(call_of("llava_batch"), 2)
    kept, features = reference.prumerge(row, keys, x, 16, neighbours, mean=True)
    merged = x.masked_scatter(kept[..., None], features)
    check_merging("prumerge", kept, merged, neighbours=neighbours)


def test_the_zoo_is_what_these_tests_take_it_for() -> None:
    for name, tokens in (("llava_batch", 65), ("llava_next", 17)):
        assert VLMS[name].vision_tokens == tokens
        assert len(tower_layers(module_of(name))) == 4  # features are those behind the third
