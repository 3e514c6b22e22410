"""The reference that the compiler is checked against is itself right."""

from __future__ import annotations

import pytest
import torch

from tests import reference_tome as tome
from tests.zoo import ZOO, smooth_image
from tests.zoo.timm_models import vit

TRIMS = ["timm_vit", "timm_vit_gap", "timm_vit_avg", "timm_vit_qk_norm", "timm_vit_registers", "timm_deit3"]
PREFIXED = [*TRIMS, "timm_deit_distilled", "timm_vit_map"]


@pytest.mark.parametrize("name", PREFIXED)
def test_removing_nothing_is_the_model_bit_for_bit(name: str) -> None:
    call = ZOO[name].build(3)
    merged, record = tome.merged_call(call.module, *call.args, r=0)
    assert torch.equal(merged, call.run()[0])
    assert record.size is None
    assert record.tokens == [ZOO[name].tokens] * ZOO[name].blocks


@pytest.mark.parametrize("name", PREFIXED)
def test_the_model_is_left_as_it_was(name: str) -> None:
    call = ZOO[name].build(1)
    before = call.run()[0]
    tome.merged_call(call.module, *call.args, r=3)
    assert torch.equal(before, call.run()[0])


@pytest.mark.parametrize("name", PREFIXED)
@pytest.mark.parametrize("r", [1, 3, [4, 0, 2], [2]])
def test_every_block_loses_its_share(name: str, r: int | list[int]) -> None:
    entry = ZOO[name]
    call = entry.build(2)
    prefix = call.module.num_prefix_tokens
    merged, record = tome.merged_call(call.module, *call.args, r=r)
    left, expected = entry.tokens, []
    for removed in tome.schedule(r, entry.blocks):
        left -= min(removed, (left - prefix) // 2)
        expected.append(left)
    assert record.tokens == expected
    assert record.size is not None and record.slot is not None
    assert torch.equal(record.size.sum(1), torch.full((2,), float(entry.tokens)))
    assert torch.equal(record.size[:, :prefix], torch.ones(2, prefix))
    assert torch.equal(record.slot[:, :prefix], torch.arange(prefix).expand(2, prefix))
    counts = torch.nn.functional.one_hot(record.slot, expected[-1]).sum(1)
    assert torch.equal(counts.float(), record.size)
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("name", PREFIXED)
def test_samples_do_not_see_each_other(name: str) -> None:
    entry = ZOO[name]
    three = entry.build(3)
    together, _ = tome.merged_call(three.module, *three.args, r=3)
    for index in range(3):
        alone, _ = tome.merged_call(three.module, three.args[0][index : index + 1], r=3)
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)


def test_matching_by_hand() -> None:
    # Tokens 0..5 point to angles; even 0, 2, 4 look for partners among odd 1, 3, 5.
    angle = torch.tensor([[0.0, 1.0, 0.9, 2.0, 2.3, 0.1]])
    metric = torch.stack([angle.cos(), angle.sin()], -1)
    slot, keep = tome.match(metric, 2)
    # Closest pairs: (0, 5) and (2, 1), both 0.1 apart, before (4, 3) at 0.3. Token 4 stays and comes first.
    assert keep.tolist() == [[4, 1, 3, 5]]
    assert slot.tolist() == [[3, 1, 1, 2, 0, 3]]
    slot, keep = tome.match(metric, 2, prefix=1)
    assert keep.tolist() == [[0, 1, 3, 5]]
    assert slot.tolist() == [[0, 1, 1, 2, 2, 3]]
    slot, keep = tome.match(metric, 9, prefix=2)  # clamped to (6 - 2) // 2; column 1 may not receive
    assert keep.tolist() == [[0, 1, 3, 5]]
    assert slot.tolist() == [[0, 1, 3, 2, 2, 3]]


def test_kept_tokens_without_a_prefix_come_by_falling_similarity() -> None:
    angle = torch.tensor([[0.0, 0.5, 2.0, 2.05, 4.0, 4.2, 6.0, 9.0]])
    metric = torch.stack([angle.cos(), angle.sin()], -1)
    _, keep = tome.match(metric, 1)
    assert keep[0, :3].tolist() == _order(angle[0])
    assert keep[0, 3:].tolist() == [1, 3, 5, 7]


def _order(angle: torch.Tensor) -> list[int]:
    best = [(max(float(torch.cos(angle[i] - angle[j])) for j in (1, 3, 5, 7)), i) for i in (0, 2, 4, 6)]
    return [i for _, i in sorted(best, reverse=True)][1:]


def test_a_zero_key_is_no_accident() -> None:
    slot, keep = tome.match(torch.zeros(1, 6, 4), 2)
    assert keep.shape == (1, 4)
    assert int(slot.max()) == 3


def test_merging_keeps_the_weighted_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (2, 10), generator=generator).double()
    slot, _ = tome.match(x, 4)
    y, new_size = tome.merge(x, size, slot)
    assert y.shape == (2, 6, 4)
    torch.testing.assert_close((y * new_size[..., None]).sum(1), (x * size[..., None]).sum(1))
    assert torch.equal(new_size.sum(1), size.sum(1))


def test_equal_tokens_merge_without_a_trace() -> None:
    # Proportional attention and the weighted pool make merging of equal tokens exact.
    model = vit(class_token=False, global_pool="avg", pos_embed="none").eval()
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 1
    with torch.no_grad():
        plain = model(image)
    merged, record = tome.merged_call(model, image, r=6)
    assert record.tokens[-1] < 16
    torch.testing.assert_close(merged, plain, rtol=1e-5, atol=1e-6)
    unweighted, _ = tome.merged_call(model, image, r=[7], weighted_pool=False)
    flat, _ = tome.merged_call(model, image, r=[7], proportional=False)
    assert not torch.allclose(unweighted, plain, atol=1e-4)
    assert not torch.allclose(flat, plain, atol=1e-4)


@pytest.mark.parametrize("inflect", [-1.0, -0.5, 0.5, 1.0])
def test_a_sloping_schedule_runs_from_first_to_last(inflect: float) -> None:
    plan = tome.schedule(8, 12, inflect)
    assert plan[0] == int(8 * (1 - inflect))
    assert plan[-1] == 2 * 8 - plan[0]
    assert plan == sorted(plan, reverse=inflect < 0)
    assert tome.schedule(8, 1, inflect) == [int(8 * (1 - inflect))]


def test_smooth_pictures_hardly_drift() -> None:
    entry = ZOO["timm_vit_avg"]
    module = entry.module()
    image = smooth_image(4, 32, 32, seed=3)
    with torch.no_grad():
        plain = module(image)
    merged, _ = tome.merged_call(module, image, r=2)
    correlation = torch.corrcoef(torch.stack([plain.flatten(), merged.flatten()]))[0, 1]
    assert correlation > 0.9
