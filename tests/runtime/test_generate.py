"""Generation around a stand-in for the step graph: loop, sampling, text, checks, the shell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError, ModelFileError
from elision.runtime.generate import Generator
from elision.runtime.generate_sampling import Sampler, Sampling, adjusted, distribution, from_model
from elision.runtime.lm_facts import Facts, facts_from, facts_of_module
from elision.runtime.lm_step import Slots, chain, joined, prompt_chunks, tree
from elision.runtime.lm_text import Stream, Text
from hypothesis import given, settings
from hypothesis import strategies as st

from .lm_double import Recompute, byte_tokenizer, tiny_llama

PROMPTS = [[5, 9, 33], [7], [4, 4, 4, 4, 8, 9, 10, 90, 3], [100, 3]]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def generator(llama):
    return Generator.around(Recompute(llama), facts_of_module(llama))


def theirs(model, ids, count, **options):
    """transformers' own new ids."""
    options = {"do_sample": False, "pad_token_id": 0} | options
    given = torch.tensor([ids])
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, **options)
    return found[0, len(ids) :].tolist()


# ---- the loop ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ids", PROMPTS)
def test_greedy_is_transformers(llama, generator, ids):
    result = generator.generate(ids, 12)
    assert result.token_ids == theirs(llama, ids, 12)
    assert result.finish == "length" and result.new_tokens == 12 and result.prompt_tokens == len(ids)
    assert result.prefill_seconds > 0 and result.decode_seconds > 0
    assert math.isclose(result.tokens_per_second, 11 / result.decode_seconds, rel_tol=1e-2)


def test_a_batch_is_its_prompts_one_by_one(llama):
    model = Recompute(llama, capacity=40)  # room for two at a time: others wait for slots
    generator = Generator.around(model, facts_of_module(llama), batch=3)
    results = generator.generate(PROMPTS, 10)
    assert [r.token_ids for r in results] == [theirs(llama, ids, 10) for ids in PROMPTS]
    assert 2 in model.calls  # steps were taken together
    assert max(model.calls) <= 9


@pytest.mark.parametrize(
    "options, own",
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"ngram": 2}, {"no_repeat_ngram_size": 2}),
    ],
)
def test_penalties_are_transformers(llama, generator, options, own):
    for ids in PROMPTS:
        assert generator.generate(ids, 12, **options).token_ids == theirs(llama, ids, 12, **own)


def test_what_generation_config_says_is_done(llama):
    facts = facts_from(
        llama.config.to_dict(),
        {
            "repetition_penalty": 1.5,
            "suppress_tokens": [3, 4],
            "eos_token_id": [2, 17],
            "forced_eos_token_id": 2,
        },
    )
    assert facts.ends == (2, 17)
    generator = Generator.around(Recompute(llama), facts)
    own = {
        "repetition_penalty": 1.5,
        "suppress_tokens": [3, 4],
        "forced_eos_token_id": 2,
        "eos_token_id": [2, 17],
    }
    for ids in PROMPTS:
        assert generator.generate(ids, 8).token_ids == theirs(llama, ids, 8, **own)
    assert generator.generate([5], 8, repetition_penalty=1.0).settings.get("repetition_penalty") is None


def test_ends(llama, generator):
    ids = theirs(llama, [5, 9, 33], 12)
    result = generator.generate([5, 9, 33], 12, eos=[ids[4]])
    assert result.token_ids == ids[: ids.index(ids[4]) + 1] and result.finish == "eos"
    assert generator.generate([5, 9, 33], 12, eos=[]).new_tokens == 12


def test_nothing_asked_for(generator):
    result = generator.generate([5], 0)
    assert result.token_ids == [] and result.finish == "length" and result.tokens_per_second is None


def test_long_prompts_are_read_in_chunks(llama):
    model = Recompute(llama)
    ids = [3 + (7 * i) % 90 for i in range(23)]
    (whole,) = [model.step(rows, [len(rows) - 1]).copy() for rows in prompt_chunks(2, ids)]
    assert model.calls == [23]
    *_, again = [model.step(rows, [len(rows) - 1]) for rows in prompt_chunks(30, ids, chunk=5)]
    assert model.calls[1:] == [5, 5, 5, 5, 3]
    assert np.array_equal(whole, again)


# ---- limits ------------------------------------------------------------------------------------------
def test_the_models_own_context_ends_a_text(llama):
    generator = Generator.around(Recompute(llama, capacity=100), facts_of_module(llama))
    result = generator.generate(list(range(3, 63)), 40, eos=[])
    assert result.finish == "context"
    assert result.prompt_tokens + result.new_tokens == 65  # 64 positions; the last id needs none


def test_limits_are_one_line(llama):
    generator = Generator.around(Recompute(llama, capacity=20), facts_of_module(llama))
    with pytest.raises(ElisionError, match="the model's context 64"):
        generator.generate(list(range(3, 70)), 1)
    with pytest.raises(ElisionError, match="21 tokens, the cache 20"):
        generator.generate(list(range(3, 24)), 1)
    with pytest.raises(ElisionError, match="cache is too small"):
        generator.generate(list(range(3, 13)), 12)
    assert generator.generate(list(range(3, 13)), 11, eos=[]).new_tokens == 11
    for ids, text in ([], "empty"), ([120], "120 is out of range"), ([-1], "-1 is out of range"):
        with pytest.raises(ElisionError, match=text):
            generator.generate(ids, 1)
    with pytest.raises(ElisionError, match="prompt 2 is empty"):
        generator.generate([[3], []], 1)
    with pytest.raises(ElisionError, match="without a tokenizer"):
        generator.generate("text", 1)
    with pytest.raises(ElisionError, match="'top_z'"):
        generator.generate([3], 1, top_z=1)
    with pytest.raises(ElisionError, match="no encoder"):
        generator.generate([3], 1, encoder_inputs=[3])
    with pytest.raises(ElisionError, match="text or a list"):
        generator.generate([3, 4.5], 1)


# ---- sampling ----------------------------------------------------------------------------------------
SCORES = np.random.default_rng(3).standard_normal(50).astype(np.float32) * 3


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=7),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.9, top_k=20, top_p=0.5),
        Sampling(temperature=2.0, top_p=1e-9),
        Sampling(temperature=1.0, top_k=1),
    ],
)
def test_the_distribution_is_transformers(how):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(how.temperature)])
    warpers += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    warpers += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(SCORES)[None].clone())
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    ids, weights = distribution(SCORES, how)
    found = np.zeros(50)
    found[ids] = weights
    assert np.allclose(found, expected, atol=1e-6)
    assert (np.diff(weights) <= 0).all()


def test_ties_go_to_the_lowest_id():
    scores = np.array([1, 3, 3, 2, 3], np.float32)
    assert Sampler(Sampling()).choose(scores, [], 0) == 1
    assert distribution(scores, Sampling(temperature=1.0, top_k=2))[0].tolist() == [1, 2, 4]


def test_samples_follow_the_distribution_and_the_seed():
    how = Sampling(temperature=1.0, top_k=5, seed=11)
    ids, weights = distribution(SCORES, how)
    sampler = Sampler(how)
    drawn = [sampler.choose(SCORES, [], i) for i in range(4000)]
    shares = np.array([drawn.count(item) / 4000 for item in ids])
    assert np.abs(shares - weights).max() < 0.03
    again, other = Sampler(how), Sampler(how, number=1)
    assert [again.choose(SCORES, [], i) for i in range(50)] == drawn[:50]
    assert [other.choose(SCORES, [], i) for i in range(50)] != drawn[:50]


def test_a_seed_gives_the_same_in_any_batch(llama, generator):
    options = {"temperature": 1.5, "top_k": 30, "seed": 5, "eos": []}
    results = generator.generate([[5, 9], [7]], 10, **options)
    alone = Generator.around(Recompute(llama), generator.facts, batch=1).generate(
        [[5, 9], [7]], 10, **options
    )
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert generator.generate([5, 9], 10, **options).token_ids == results[0].token_ids
    assert generator.generate([5, 9], 10, **options | {"seed": 6}).token_ids != results[0].token_ids


def test_temperature_zero_is_greedy_and_scores_are_not_written_to():
    before = SCORES.copy()
    assert Sampler(Sampling(repetition_penalty=1.2)).choose(SCORES, [1, 2], 0) == int(
        np.argmax(adjusted(SCORES, [1, 2], 0, Sampling(repetition_penalty=1.2)))
    )
    assert np.array_equal(before, SCORES)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.5},
        {"top_k": -1}, {"seed": -1}, {"repetition_penalty": 0.0}, {"repetition_penalty": -2.0},
    ],
)  # fmt: skip
def test_meaningless_options(options):
    with pytest.raises(ElisionError):
        Sampling(**options)


@pytest.mark.parametrize("scores", [[math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 0.0]])
def test_scores_that_are_no_numbers(scores):
    with pytest.raises(ElisionError, match="not finite"):
        Sampler(Sampling()).choose(np.array(scores, np.float32), [], 0)


def test_what_the_model_says_gives_way_to_what_is_asked():
    config = {
        "repetition_penalty": 1.3,
        "temperature": 0.6,
        "begin_suppress_tokens": [1],
        "forced_bos_token_id": [4],
    }
    found = from_model(config, Sampling(), [])
    assert found == Sampling(repetition_penalty=1.3, suppress_first=(1,), forced_first=4)
    assert (
        from_model(config, Sampling(repetition_penalty=1.0), ["repetition_penalty"]).repetition_penalty == 1
    )


# ---- slots and rows ------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_slots_never_overlap(steps):
    slots, taken = Slots(23), {}
    for give, count in steps:
        if give and taken:
            slots.give_back(start := sorted(taken)[count % len(taken)])
            del taken[start]
            continue
        start = slots.take(count)
        used = {slot for first, size in taken.items() for slot in range(first, first + size)}
        if start is None:
            free = [all(s + i not in used for i in range(count)) for s in range(23 - count + 1)]
            assert not any(free)
            continue
        new = set(range(start, start + count))
        assert not new & used and max(new) < 23
        taken[start] = count


def test_rows_of_a_chain_and_a_tree():
    rows = chain(10, 3, [7, 8])
    assert rows.slots.tolist() == [13, 14] and rows.positions.tolist() == [3, 4]
    assert rows.prefix.tolist() == [[10, 3], [10, 4]] and rows.ancestors.tolist() == [[13], [14]]
    rows = tree(10, 3, [7, 8, 9, 7], [-1, 0, 0, 2])
    assert rows.positions.tolist() == [3, 4, 4, 5]
    assert rows.ancestors.tolist() == [[13, -1, -1], [13, 14, -1], [13, 15, -1], [13, 15, 16]]
    both = joined([chain(0, 0, [1]), rows])
    assert both.ancestors.tolist()[0] == [0, -1, -1] and len(both) == 5
    assert {array.dtype.name for array in (both.slots, both.prefix, both.ancestors)} == {"int32"}
    assert both.ids.dtype == both.positions.dtype == np.int64


# ---- text ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def text():
    return Text(byte_tokenizer(), 260)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=20))
def test_streamed_text_is_the_decoded_text(text, string):
    string = "".join(c for c in string if not "\ud800" <= c <= "\udfff")
    ids = text.encode(string)
    stream = Stream(text)
    pieces = [stream.push(item) for item in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == text.decode(ids)
    for piece in pieces[:-1]:
        assert "\ufffd" not in piece or "\ufffd" in string


@settings(max_examples=200, deadline=None)
@given(st.text("abé", max_size=16), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings(text, string, stops):
    """However the text is cut into ids: what comes out ends before the first stop string, and no part of one that is
    later completed was given out."""
    places = [place for place in (string.find(stop) for stop in stops) if place >= 0]
    stream = Stream(text, stops)
    out = ""
    for item in text.encode(string):
        out += stream.push(item)
        if stream.stopped:
            break
    out += stream.finish()
    assert stream.stopped == bool(places)
    # The stop string that is complete first ends the text; another may begin before it.
    ends = [string.find(stop) + len(stop) for stop in stops if stop in string]
    if ends:
        seen = string[: min(ends)]
        assert out == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    else:
        assert out == string


def test_broken_bytes_are_told_at_the_end(text):
    stream = Stream(text)
    assert [stream.push(3 + byte) for byte in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


def test_special_ids_give_no_text(text):
    stream = Stream(text)
    assert "".join(stream.push(item) for item in (1, 3 + ord("a"), 2, 3 + ord("b"))) + stream.finish() == "ab"


def test_wrong_tokenizer():
    with pytest.raises(ModelFileError, match="259 words"):
        Text(byte_tokenizer(), 120)
    with pytest.raises(ElisionError, match="surrogate"):
        Text(byte_tokenizer(), 260).encode("a\ud800")


def test_chat_template():
    tokenizer = byte_tokenizer()
    plain = Text(tokenizer, 260)
    with pytest.raises(ElisionError, match="no chat template"):
        plain.encode("hi", chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert plain.decode(plain.encode("hi", chat=True, system="be")) == "<system>be<user>hi>"
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ElisionError, match="no system here"):
        plain.encode("hi", chat=True)


@pytest.fixture(scope="module")
def writer():
    model = tiny_llama(vocabulary=260)
    return Generator.around(Recompute(model), facts_of_module(model), byte_tokenizer())


def test_stream_and_generate_agree(writer):
    whole = writer.generate("hello", 20, eos=[])
    stream = writer.stream("hello", 20, eos=[])
    assert "".join(stream) == whole.text
    assert stream.result.token_ids == whole.token_ids and stream.result.finish == "length"


def test_stop_in_generation(writer):
    ids = writer.generate("hello", 20, eos=[]).token_ids
    text = writer.text.decode(ids)
    stop = next(text[i : i + 2] for i in range(4, 16) if "\ufffd" not in text[i : i + 2])
    result = writer.generate("hello", 20, eos=[], stop=stop)
    assert result.finish == "stop" and result.text == text[: text.find(stop)]
    assert result.token_ids == ids[: result.new_tokens] and result.settings["stop"] == [stop]


def test_a_stream_that_is_left_early(writer):
    stream = writer.stream("hello", 20, eos=[])
    next(stream)
    assert 1 <= stream.result.new_tokens < 20 and stream.result.finish is None


def test_facts():
    with pytest.raises(ModelFileError, match="vocab_size"):
        facts_from({}, {})
    assert facts_from({"vocab_size": 9, "model_type": "bloom", "n_positions": 4}, {}).positions is None
    facts = facts_from({"vocab_size": 9, "text_config": {"max_position_embeddings": 5}}, {"eos_token_id": 3})
    assert facts == Facts(9, 5, (3,)) and Facts.from_json(facts.to_json()) == facts
