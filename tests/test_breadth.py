"""Every zoo model, in both hosts: it merges with bounded drift, or refuses with a sentence.

The sentences are repeated in docs/support.md, which `make support` writes from the same runs.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import elision
from tests.zoo import ZOO, Built, ZooModel
from tests.zoo.export import export, exported, onnx_file, onnx_outputs, quiet
from tests.zoo.outcome import (
    HOSTS,
    as_arrays,
    attempt,
    correlation,
    frames,
    merged,
    original,
    real_rows,
)
from tests.zoo.support import FAST, page, row, rows_of
from tests.zoo.text_support import HEADING as TEXT_HEADING
from tests.zoo.text_support import TEXTS, text_row
from tests.zoo.vlm import VLMS
from tests.zoo.vlm_support import HEADING as VLM_HEADING
from tests.zoo.vlm_support import vlm_row

NOTHING = "token-merge{r=0}"
MASKED = [name for name, entry in ZOO.items() if entry.mask]
EVERY = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ZOO]


def _finite_and_close(entry: ZooModel, call: Built, plain: list, got: list, bound: float) -> None:
    assert [g.shape for g in got] == [p.shape for p in plain]
    for before, after in zip(plain, got):
        assert np.isfinite(after).all()
        assert correlation(real_rows(entry, call, before), real_rows(entry, call, after)) > bound


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ZOO)
def test_it_merges_with_bounded_drift_or_says_why_not(name: str, host: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    outcome = merged(entry, host, zoo_folder)
    if not outcome.merges:
        assert outcome.sentence.strip()
        assert "\n" not in outcome.sentence
        return
    before, after = outcome.before, outcome.after
    assert len(after) == len(before)
    assert all(a <= b for a, b in zip(after, before))
    assert sum(after) < sum(before)
    for batch in (1, 3):
        call = entry.build(batch)
        plain = original(entry, host, call, zoo_folder)
        _finite_and_close(entry, call, plain, outcome.run(call), entry.correlation)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ZOO)
def test_removing_nothing_changes_no_bit(name: str, host: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    outcome = attempt(entry, host, NOTHING, zoo_folder)
    if not outcome.merges:
        assert outcome.sentence.strip()
        return
    call = entry.build(3)
    if host == "torch":  # what was given: export itself may move the last bit of an eager module
        wanted = as_arrays(call.run(exported(entry).module()))
    else:
        wanted = original(entry, host, call, zoo_folder)
    got = outcome.run(call)
    for before, after in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", EVERY)
def test_both_hosts_do_the_same(name: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    torch_side, onnx_side = (merged(entry, host, zoo_folder) for host in HOSTS)
    assert torch_side.merges == onnx_side.merges, torch_side.sentence + onnx_side.sentence
    if torch_side.merges:
        assert torch_side.after == onnx_side.after
        call = entry.build(3)
        for one, other in zip(torch_side.run(call), onnx_side.run(call), strict=True):
            np.testing.assert_allclose(
                real_rows(entry, call, one), real_rows(entry, call, other), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("name", EVERY)
def test_a_fixed_batch_merges_as_a_dynamic_one_does(name: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    dynamic = merged(entry, "torch", zoo_folder)
    for batch in (1, 3):
        call = entry.build(batch)
        try:
            with quiet():
                fixed = elision.optimize(export(call), entry.passes, example_inputs=call.args, force=True)
        except (elision.Refused, elision.NothingMatched):
            assert not dynamic.merges
            continue
        assert dynamic.merges
        for one, other in zip(as_arrays(call.run(fixed.module)), dynamic.run(call), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_merges_too(name: str) -> None:
    entry = ZOO[name]
    call = entry.build(3, torch.bfloat16)
    plain = call.run()
    try:
        with quiet():
            result = elision.optimize(export(call), entry.passes, example_inputs=call.args, force=True)
    except (elision.Refused, elision.NothingMatched) as error:
        assert str(error).strip()
        return
    got = call.run(result.module)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    _finite_and_close(entry, call, as_arrays(plain), as_arrays(got), entry.correlation - 0.1)


# ---- padding ---------------------------------------------------------------------------------------------


def _crop(entry: ZooModel, call: Built, length: int) -> Built:
    """The same samples, padded to `length` only."""
    axes = [entry.dynamic.get(name, (0,)) for name in entry.inputs(1)]
    cut = tuple(v[:, :length] if 1 in a else v for v, a in zip(call.args, axes))
    return Built(call.module, cut)


def _sample(call: Built, index: int) -> Built:
    return Built(call.module, tuple(value[index : index + 1] for value in call.args))


def _count(entry: ZooModel, call: Built, index: int) -> int:
    mask = call.args[list(entry.inputs(1)).index(entry.mask)]
    return int(mask[index].sum())


def _compared(entry: ZooModel, samples: int, output: np.ndarray) -> np.ndarray:
    """The rows of one sample [1, ...] that are not padding."""
    if not entry.per_token:
        return output
    return output[:, : int(frames(entry, np.array(samples)))]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", MASKED)
def test_a_result_does_not_depend_on_the_neighbours(name: str, host: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    outcome = merged(entry, host, zoo_folder)
    if not outcome.merges:
        return
    together = entry.build(4)
    results = outcome.run(together)
    for index in range(4):
        alone = outcome.run(_sample(together, index))
        samples = _count(entry, together, index)
        for all_rows, own in zip(results, alone, strict=True):
            np.testing.assert_allclose(
                _compared(entry, samples, own),
                _compared(entry, samples, all_rows[index : index + 1]),
                rtol=2e-4,
                atol=2e-5,
            )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", MASKED)
def test_a_result_does_not_depend_on_what_the_padding_holds(name: str, host: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    outcome = merged(entry, host, zoo_folder)
    if not outcome.merges or entry.reads_padding:
        return
    call = entry.build(4)
    names = list(entry.inputs(1))
    mask = call.args[names.index(entry.mask)]
    noise = torch.randint(5, 90, mask.shape, generator=torch.Generator().manual_seed(9))
    noisy = tuple(
        torch.where(mask.bool(), v, noise.to(v.dtype)) if n != entry.mask and v.shape == mask.shape else v
        for n, v in zip(names, call.args)
    )
    for clean, other in zip(outcome.run(call), outcome.run(Built(call.module, noisy)), strict=True):
        np.testing.assert_allclose(
            real_rows(entry, call, other), real_rows(entry, call, clean), rtol=2e-4, atol=2e-5
        )


@pytest.mark.parametrize("name", [n for n in MASKED if not ZOO[n].whole_length])
def test_a_result_does_not_depend_on_the_amount_of_padding(name: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    outcome = merged(entry, "torch", zoo_folder)
    if not outcome.merges:
        return
    long = _sample(entry.build(3), 2)
    count = _count(entry, long, 0)
    for length in (count, (count + long.args[0].shape[1]) // 2):
        short = _crop(entry, long, length)
        before, after = as_arrays(long.run()), as_arrays(short.run())
        for one, other in zip(before, after, strict=True):  # the model itself does not depend on it
            np.testing.assert_allclose(
                _compared(entry, count, one), _compared(entry, count, other), rtol=1e-4, atol=1e-5
            )
        with quiet():
            cropped = elision.optimize(export(short), entry.passes, example_inputs=short.args, force=True)
        for one, other in zip(outcome.run(long), as_arrays(short.run(cropped.module)), strict=True):
            np.testing.assert_allclose(
                _compared(entry, count, one), _compared(entry, count, other), rtol=2e-4, atol=2e-5
            )


# ---- the zoo itself, and its page -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_onnx_file_is_the_model(name: str, zoo_folder: Path) -> None:
    entry = ZOO[name]
    file = onnx_file(entry, zoo_folder)
    for batch in (1, 3):
        call = entry.build(batch)
        for ours, theirs in zip(as_arrays(call.run()), onnx_outputs(file, call), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=5e-5)


def test_weights_and_inputs_depend_on_names_only() -> None:
    for name in FAST:
        first, second = ZOO[name].build(3), ZOO[name].build(3)
        for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
            assert torch.equal(one, other)
        assert all(torch.equal(a, b) for a, b in zip(first.args, second.args, strict=True))
        part = ZOO[name].build(1)
        assert all(torch.equal(a[:1], b) for a, b in zip(first.args, part.args, strict=True))


def nameless(text: str) -> str:
    return re.sub(r"%\w+", "%value", text)


def test_the_support_page_is_current(zoo_folder: Path) -> None:
    """Run `make support` where this fails. How values are called differs between versions of torch."""
    assert page().exists()
    text = page().read_text(encoding="utf-8")
    written = rows_of(text)
    assert list(written) == list(ZOO)
    for name in FAST:
        outcomes = [merged(ZOO[name], host, zoo_folder) for host in HOSTS]
        assert nameless(written[name]) == nameless(row(ZOO[name], outcomes))
    written = rows_of(text, VLM_HEADING)
    assert list(written) == list(VLMS)
    for name in ("llava_batch", "internvl"):
        assert nameless(written[name]) == nameless(vlm_row(VLMS[name], zoo_folder))


@pytest.mark.parametrize(
    "name", [n if n == "bert" else pytest.param(n, marks=pytest.mark.slow) for n in TEXTS]
)
def test_the_support_page_on_texts_is_current(name: str, zoo_folder: Path) -> None:
    """Run `make support` where this fails."""
    written = rows_of(page().read_text(encoding="utf-8"), TEXT_HEADING)
    assert list(written) == list(TEXTS)
    assert nameless(written[name]) == nameless(text_row(TEXTS[name], zoo_folder))
