"""The Transformers engine against plain `transformers` calls on the same tiny model."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from clear_datasets import BSDetector, Clear
from clear_datasets.engines import Asks, EngineError, PromptError
from clear_datasets.engines.chats import Chats
from clear_datasets.engines.checkpoint import load
from clear_datasets.engines.decoding import State
from clear_datasets.engines.labels import Labels
from clear_datasets.engines.planning import HELD
from clear_datasets.engines.transformers import Transformers
from tests.conftest import TEMPLATE, make_tiny

PASSAGE = "The river rises in the Alps and ends in the North Sea; nobody swims in it in winter. " * 2
TEXTS = [
    "Who?",
    PASSAGE + "Where does it rise?",
    "2 + 2 = ?",
    PASSAGE + "Where does it end?",
    "größer, 日本語, 🙂",
    "Who?",
]


@pytest.fixture(scope="module")
def plain(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(tiny)


def next_probabilities(plain, prompt, stem=()):
    model, tokenizer = plain
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False) + list(stem)
    with torch.inference_mode():
        return torch.softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1).numpy()


def greedy(plain, prompt, max_tokens):
    model, tokenizer = plain
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_greedy_answers_equal_those_of_transformers_in_the_order_asked(tiny, plain, user, batch_tokens):
    prompts = [user(t) for t in TEXTS]
    answers = Transformers(tiny, dtype="float32", batch_tokens=batch_tokens).generate(prompts, max_tokens=12)
    assert answers == [[greedy(plain, p, 12)] for p in prompts]
    assert len({a[0] for a in answers}) > 3


@pytest.mark.parametrize("batch_tokens", [200, 4096])
def test_label_probabilities_sum_over_spellings(tiny, plain, user, batch_tokens):
    prompts = [user(t) for t in TEXTS]
    engine = Transformers(tiny, dtype="float32", batch_tokens=batch_tokens)
    found = engine.choose(prompts, ["Y", "N"])
    for prompt, row in zip(prompts, found, strict=True):
        p = next_probabilities(plain, prompt)
        spelled = [sum(p[plain[1].convert_tokens_to_ids(t)] for t in ts) for ts in (("Y", "ĠY"), ("N", "ĠN"))]
        if sum(spelled) < 0.01:
            assert np.isnan(row).all()
        else:
            np.testing.assert_allclose(row, np.array(spelled) / sum(spelled), rtol=1e-4)
    assert found.dtype == np.float32
    assert found.shape == (6, 2)


def test_labels_of_several_tokens_multiply_and_a_label_that_another_continues_gives_up_its_share(tiny, plain, user):
    prompt = user("Which?")
    token = plain[1].convert_tokens_to_ids
    first = next_probabilities(plain, prompt)
    mass = {"A": 0.0, "AB": 0.0}
    for lead in ((), (token("Ġ"),)):
        p = first if not lead else next_probabilities(plain, prompt, lead)
        before = first[lead[0]] if lead else 1.0
        a = before * p[token("A")]
        ab = a * next_probabilities(plain, prompt, (*lead, token("A")))[token("B")]
        mass["A"] += a - ab
        mass["AB"] += ab
    total = sum(mass.values())
    found = Transformers(tiny, dtype="float32").choose([prompt], ["A", "AB"])[0]
    if total < 0.01:
        assert np.isnan(found).all()
    else:
        np.testing.assert_allclose(found, [mass["A"] / total, mass["AB"] / total], rtol=1e-3)


def test_a_label_that_the_model_would_not_say_is_nan(tiny, user):
    found = Transformers(tiny, dtype="float32").choose([user("Who?")], ["Zebra crossing", "Quite another thing"])
    assert np.isnan(found).all()


def test_samples_depend_on_prompt_number_and_seed_only(tiny, user):
    engine = Transformers(tiny, dtype="float32")
    prompts = [user(t) for t in TEXTS]
    together = engine.generate(prompts, n=3, temperature=1.0, max_tokens=8)
    assert [len(a) for a in together] == [3] * 6
    assert together[3] == engine.generate([prompts[3]], n=3, temperature=1.0, max_tokens=8)[0]
    assert together[3] == engine.generate([prompts[3]], n=5, temperature=1.0, max_tokens=8)[0][:3]
    assert together[0] == together[5]
    small = Transformers(tiny, dtype="float32", batch_tokens=60)  # several windows, whose last samples are joined
    assert small.generate(prompts, n=30, temperature=1.0, max_tokens=8) == engine.generate(
        prompts, n=30, temperature=1.0, max_tokens=8
    )
    assert len(set(together[0])) > 1
    assert together != Transformers(tiny, dtype="float32", seed=1).generate(prompts, n=3, temperature=1.0, max_tokens=8)


def test_each_prompt_may_have_a_limit_of_its_own(tiny, user):
    engine = Transformers(tiny, dtype="float32")
    prompts, limits = [user(t) for t in TEXTS[:3]], [3, 9, 6]
    found = engine.generate(prompts, n=2, temperature=1.0, max_tokens=limits)
    for prompt, limit, texts in zip(prompts, limits, found, strict=True):
        assert [texts] == engine.generate([prompt], n=2, temperature=1.0, max_tokens=limit)
    with pytest.raises(ValueError, match="2 numbers for 3 prompts"):
        engine.generate(prompts, max_tokens=[1, 2])


def test_samples_follow_the_models_distribution(tiny, plain, user):
    prompt = user("Who?")
    drawn = Transformers(tiny, dtype="float32").generate([prompt], n=4000, temperature=1.0, max_tokens=1)[0]
    p = next_probabilities(plain, prompt)
    texts = [plain[1].decode([i], skip_special_tokens=True).strip() for i in range(len(p))]
    for text in sorted(set(texts), key=lambda t: -sum(q for q, u in zip(p, texts, strict=True) if u == t))[:5]:
        share = sum(float(q) for q, u in zip(p, texts, strict=True) if u == text)
        assert abs(drawn.count(text) / 4000 - share) < 4 * np.sqrt(share / 4000)


@pytest.mark.parametrize("batch_tokens", [200, 4096])
def test_logprobs_of_a_response_and_its_end(tiny, plain, user, batch_tokens):
    model, tokenizer = plain
    responses = ["", "Alps", "in the North Sea, " * 5, "5", "日本", "Alps"]
    found = Transformers(tiny, dtype="float32", batch_tokens=batch_tokens).logprobs([user(t) for t in TEXTS], responses)
    for text, response, logprobs in zip(TEXTS, responses, found, strict=True):
        prompt = tokenizer.apply_chat_template(user(text), tokenize=False, add_generation_prompt=True)
        before = tokenizer.encode(prompt, add_special_tokens=False)
        said = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(torch.tensor([before + said])).logits[0, len(before) - 1 : -1].float()
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, wanted, atol=1e-3)
        assert logprobs.dtype == np.float32


def test_a_long_response_is_read_in_pieces_with_few_logits_at_a_time(tmp_path, user, monkeypatch):
    folder = str(make_tiny(tmp_path, max_position_embeddings=4096))
    engine = Transformers(folder, dtype="float32")
    texts, responses = [TEXTS[1], TEXTS[3], "Who?"], ["Alps", "the Rhine, " * 150, "x" * 1100]
    kept, forward = [], State.forward

    def counted(self, rows, keep=1):
        kept.append(len(rows) * keep)
        return forward(self, rows, keep)

    monkeypatch.setattr(State, "forward", counted)
    found = engine.logprobs([user(t) for t in texts], responses)
    assert 1 < max(kept) <= 512
    model, tokenizer = load(engine).model, load(engine).chats.tokenizer
    for text, response, logprobs in zip(texts, responses, found, strict=True):
        prompt = tokenizer.apply_chat_template(user(text), tokenize=False, add_generation_prompt=True)
        ids = [*tokenizer.encode(prompt + response, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        np.testing.assert_allclose(logprobs, wanted[-len(logprobs) :, 0], atol=1e-3)
    assert [len(x) for x in found] == [5, 1651, 1101]


def test_many_prompts_with_one_beginning_are_not_written_all_at_once(tiny, user, monkeypatch):
    engine = Transformers(tiny, dtype="float32", batch_tokens=256)
    prompts = [user(f"Where does the river rise? And number {i}?") for i in range(40)]
    alone = [engine.generate([p], n=5, temperature=1.0, max_tokens=8)[0] for p in prompts[::13]]
    sizes, forward = [], State.forward

    def counted(self, rows, keep=1):
        sizes.append(len(rows))
        return forward(self, rows, keep)

    monkeypatch.setattr(State, "forward", counted)
    assert engine.generate(prompts, n=5, temperature=1.0, max_tokens=8)[::13] == alone
    assert 40 < max(sizes) < 120  # of 200 samples


def test_of_many_questions_no_vocabulary_is_held(tmp_path, user, monkeypatch):
    folder = str(make_tiny(tmp_path, vocab_size=400))
    held, add = [], Labels.add

    def counted(self, masses, row, stem, probabilities):
        held.append(len(probabilities))
        add(self, masses, row, stem, probabilities)

    monkeypatch.setattr(Labels, "add", counted)
    found = Transformers(folder, dtype="float32").choose([user(f"Is it {i}?") for i in range(5)], ["Yes", "No"])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert len(held) >= 5
    assert max(held) < 20


def test_all_kinds_in_one_queue_equal_each_alone(tiny, user):
    engine = Transformers(tiny, dtype="float32")
    write, judge = [user(t) for t in TEXTS], [user(t + " Right?") for t in TEXTS]
    asks = Asks(write, 2, 1.0, 6, judge, ["Y", "N"], [(p, "Alps") for p in write])
    together = engine.answer(asks)
    assert together.generated == engine.generate(write, n=2, temperature=1.0, max_tokens=6)
    np.testing.assert_allclose(together.chosen, engine.choose(judge, ["Y", "N"]), rtol=1e-4)
    for mine, alone in zip(together.read, engine.logprobs(write, ["Alps"] * 6), strict=True):
        np.testing.assert_allclose(mine, alone, atol=1e-4)


class Memory(TorchDispatchMode):
    """A device on which the tensors that are made in it may take so many bytes.

    Attributes:
        most: Bytes that they took at most.
    """

    def __init__(self, limit=2**60, ndim=None):
        super().__init__()
        self.limit, self.ndim, self.most, self.held = limit, ndim, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.ndim in (None, tensor.ndim):
                storage = tensor.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        if sum(self.held.values()) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        self.most = max(self.most, sum(self.held.values()))
        return out


def test_where_one_sample_fits_the_memory_all_rows_are_answered(tiny, user):
    engine = Transformers(tiny, dtype="float32", batch_tokens=60)
    prompts, settings = [user(TEXTS[1]), user(TEXTS[3])], {"temperature": 1.0, "max_tokens": 3}
    wanted = engine.generate(prompts, n=6, **settings)
    with Memory() as alone:
        engine.generate(prompts[:1], n=1, **settings)
    with Memory(int(1.2 * alone.most)):
        assert engine.generate(prompts, n=6, **settings) == wanted
    with Memory(alone.most // 2), pytest.raises(EngineError, match=r"too little memory for one request.*batch_tokens"):
        engine.generate(prompts[:1], n=1, **settings)


@pytest.mark.parametrize("batch_tokens, ends", [(300, 1), (600, 4)], ids=["joined", "some of which end"])
def test_keys_and_values_of_samples_are_held_once(tmp_path, user, batch_tokens, ends):
    folder = str(make_tiny(tmp_path, num_hidden_layers=8, ends=ends))
    engine = Transformers(folder, dtype="float32", batch_tokens=batch_tokens)
    prompts = [user(PASSAGE * 2 + f"Where does it end, and what is {i}?") for i in range(2)]
    length = len(load(engine).chats.encode(prompts, [6, 6])[0])
    with Memory(ndim=4) as memory:
        engine.generate(prompts, n=6, temperature=1.0, max_tokens=6)
    token = 8 * 2 * 32 * 4  # bytes of its keys and values: one head of 32 in each layer
    assert 1 <= memory.most / (12 * length * token) < 1.4


def make_other(folder, kind):
    """A random model whose layers keep more than keys and values that grow: of a sliding window, or recurrent ones."""
    from transformers import Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM

    make_tiny(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(AutoTokenizer.from_pretrained(folder)), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1,
        "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    if kind == "sliding":
        MistralForCausalLM(MistralConfig(sliding_window=16, **settings)).save_pretrained(folder)
    else:
        Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **settings)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind, where", [
    ("full", "before the model"), ("full", "after its first layer"), ("full", "in its logits"),
    ("sliding", "after its first layer"), ("sliding", "in its logits"), ("recurrent", "after its first layer"),
])  # fmt: skip
def test_a_batch_that_does_not_fit_the_memory_is_halved(tiny, tmp_path, user, monkeypatch, kind, where):
    engine = Transformers(tiny if kind == "full" else make_other(tmp_path, kind), dtype="float32")
    model, vocabulary = load(engine).model, load(engine).model.config.vocab_size
    prompts = [user(t) for t in TEXTS]
    asks = Asks(prompts, 4, 1.0, 6, prompts, ["Y", "N"])
    wanted = engine.answer(asks)
    modules = {"before the model": model, "after its first layer": model.model.layers[1], "in its logits": torch.Tensor}
    module, name = modules[where], "float" if where == "in its logits" else "forward"
    method, sizes = getattr(module, name), []

    def small(*args, **named):
        read = args[0] if args else named["input_ids"]
        size = 0 if where == "in its logits" and (read.ndim < 3 or read.shape[-1] != vocabulary) else len(read)
        sizes.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("out of memory")
        return method(*args, **named)

    monkeypatch.setattr(module, name, small)
    for limit in (6, 1):
        sizes.clear()
        with pytest.warns(UserWarning, match="ran short of memory: smaller batches"):
            found = engine.answer(asks)
        assert (tried := max(sizes)) > limit
        assert found.generated == wanted.generated
        np.testing.assert_allclose(found.chosen, wanted.chosen, rtol=1e-4)
        sizes.clear()
        engine.answer(asks)  # goes on with what has fitted
        assert max(sizes) < tried
    limit = 100  # memory is free again, and each call takes more of it
    sizes.clear()
    for _ in range(14):
        if max(sizes, default=0) <= 6:
            engine.answer(asks)
    assert max(sizes) > 6
    limit = 0
    with pytest.raises(EngineError, match="too little memory for one request"):
        engine.answer(asks)
    limit = 100  # memory is free again
    engine.answer(asks)
    assert max(sizes) > 6


def test_a_model_that_does_not_fit_beside_another_takes_its_place(tiny, user, monkeypatch):
    asked, other = Transformers(tiny, dtype="float32"), Transformers(tiny, dtype="float64")
    wanted = other.generate([user("Where?")], max_tokens=4)
    other.close()
    before, move, failures = load(asked), torch.nn.Module.to, ["out of memory"]

    def full(module, *args, **named):
        if failures:
            raise torch.OutOfMemoryError(failures.pop())
        return move(module, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "to", full)
    assert other.generate([user("Where?")], max_tokens=4) == wanted
    assert load(asked) is not before


def test_samples_of_several_windows_that_do_not_fit_the_memory_together(tiny, user, monkeypatch):
    engine = Transformers(tiny, dtype="float32", batch_tokens=60)
    prompts = [user(t) for t in TEXTS]
    wanted = engine.generate(prompts, n=30, temperature=1.0, max_tokens=8)
    joins = []

    def full(states):
        joins.append(len(states))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(State, "join", full)
    assert engine.generate(prompts, n=30, temperature=1.0, max_tokens=8) == wanted
    assert joins
    engine.close()


def test_prompts_that_are_too_long_are_named_with_length_and_limit(tiny, user):
    with pytest.raises(PromptError, match=r"600 are kept|tokens and 8 are kept") as caught:
        Transformers(tiny).generate([user("fits"), user("x" * 600)], max_tokens=8)
    assert list(caught.value.reasons) == [1]
    assert "608" not in caught.value.reasons[1]
    assert "the model takes 512" in caught.value.reasons[1]


def test_longrope_is_given_no_row_that_would_change_the_factors_of_those_beside_it(tmp_path: Path, user):
    from transformers import Phi3Config, Phi3ForCausalLM

    make_tiny(tmp_path)
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(
        vocab_size=len(AutoTokenizer.from_pretrained(tmp_path)), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        original_max_position_embeddings=64, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
        rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    )).save_pretrained(tmp_path)  # fmt: skip
    engine = Transformers(str(tmp_path), dtype="float32")
    long, short = user("x" * 50), user("Who?")
    with pytest.raises(PromptError, match="the model takes 64"):
        engine.generate([short, user("x" * 70)], max_tokens=8)
    assert engine.generate([short, long], max_tokens=8)[0] == engine.generate([short], max_tokens=8)[0]


def test_an_empty_batch_gives_nothing(tiny):
    engine = Transformers(tiny)
    assert engine.generate([]) == []
    assert engine.choose([], ["Yes", "No"]).shape == (0, 2)


def test_models_without_a_system_role_or_a_chat_template(tmp_path: Path, user):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    for name, template in (("strict", strict + "{{ messages[0]['content'] }}<|assistant|>"), ("bare", None)):
        (tmp_path / name).mkdir()
        folder = make_tiny(tmp_path / name, template=template)
        engine = Transformers(str(folder), dtype="float32")
        with_system, without = engine.generate([chat, user("Who?")], max_tokens=6)
        assert with_system != without


def test_a_turn_ends_where_the_chat_template_ends_it(tmp_path: Path, user):
    template = TEMPLATE.replace("<|end|>", "<|pad|>")  # not the tokenizer's eos token; both end an answer
    folder = str(make_tiny(tmp_path, template=template, eos_token_id=[1, 0]))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template(user("Who?"), tokenize=False, add_generation_prompt=True) + "No"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        wanted = model(**ids).logits[0, -1].log_softmax(-1)[0]
    [found] = Transformers(folder, dtype="float32").logprobs([user("Who?")], ["No"])
    assert found[-1] == pytest.approx(float(wanted), abs=1e-4)


def test_samples_of_a_model_whose_eos_ends_documents_end_with_their_turn(tmp_path: Path, user):
    """As of base models that come with a chat template."""
    template = TEMPLATE.replace("<|end|>", "<|system|>")
    folder = make_tiny(tmp_path, template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark, eos = tokenizer.convert_tokens_to_ids(["<|system|>", "<|end|>"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[mark] *= 5
    model.save_pretrained(folder)
    said = Transformers(str(folder), dtype="float32").generate(
        [user(t) for t in TEXTS], n=20, temperature=1.0, max_tokens=40
    )
    chats = Chats.of(tokenizer, 100, eos)
    assert (chats.ends, chats.end) == ({mark, eos}, eos)
    limit = [len(tokenizer.encode(text)) for texts in said for text in texts]
    assert sum(size < 30 for size in limit) > len(limit) / 2


def test_a_row_for_which_the_model_has_no_numbers_is_named_and_the_others_are_answered(tmp_path: Path, user):
    folder = make_tiny(tmp_path, ends=5, initializer_range=0.05)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("Z")] = float("nan")
    model.save_pretrained(folder)
    engine = Transformers(str(folder), dtype="float32")
    good, bad = [user("Who?"), user("Where is it?")], user("ZZ?")
    for ask, where in (
        (lambda rows: engine.generate(rows, n=3, temperature=1.0, max_tokens=8), 1),
        (lambda rows: engine.generate(rows, max_tokens=8), 1),
        (lambda rows: engine.choose(rows, ["Yes", "No"]), 1),
        (lambda rows: engine.logprobs(rows, ["here"] * len(rows)), 1),
    ):
        with pytest.raises(PromptError) as found:
            ask([good[0], bad, good[1]])
        assert found.value.reasons == {where: "the model's logits are not numbers: try dtype='float32'"}
        ask(good)
    rows = {"question": ["Who?", "ZZ?", "Where is it?"], "answer": ["me", "me", "there"]}
    # A sample of more tokens may say "Z" itself.
    for estimator in (BSDetector(max_tokens=1), BSDetector(samples="plain", alpha=1.0, beta=1.0, max_tokens=1)):
        scored = Clear(engine=engine, confidence=estimator).score(rows)
        assert ["not numbers" in e for e in scored["clear_error"]] == [False, True, False]
        assert [bool(np.isnan(c)) for c in scored["clear_confidence"]] == [False, True, False]


@pytest.mark.parametrize("texts", [["Who?"], ["Who?", PASSAGE * 2 + "Where?"], TEXTS * 3])
def test_no_batch_holds_more_tokens_than_it_may_padding_included(tiny, user, texts):
    prompts, settings = [user(t) for t in texts], {"n": 40, "temperature": 1.0, "max_tokens": 8}
    whole = Transformers(tiny, dtype="float32").generate(prompts, **settings)
    held: list[int] = []
    forward = State.forward

    def counting(self, rows, keep=1):
        held.append(len(rows) * (self.width + max(map(len, rows))))
        return forward(self, rows, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "forward", counting)
        parts = Transformers(tiny, dtype="float32", batch_tokens=200).generate(prompts, **settings)
    assert max(held) <= 2 * HELD * 200 * 1.1  # samples grow a little after they were joined
    pairs = [pair for a, b in zip(parts, whole, strict=True) for pair in zip(a, b, strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.99 * len(pairs)  # one of 720 differs by rounding


def test_sliding_window_models_are_not_given_padding_inside_a_prompt(tmp_path: Path, user):
    folder = make_other(tmp_path, "sliding")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    prompts = [user(t) for t in TEXTS]
    engine = Transformers(folder, dtype="float32")
    assert engine.generate(prompts, max_tokens=8) == [[greedy(plain, p, 8)] for p in prompts]


def test_an_engine_is_its_configuration(tiny, user):
    engine = Transformers(tiny)
    before = pickle.dumps(engine)
    engine.generate([user("Who?")], max_tokens=2)
    assert pickle.dumps(engine) == before
    assert pickle.loads(before) == engine


def test_a_gguf_file_that_is_not_there(tmp_path: Path, user):
    with pytest.raises(FileNotFoundError, match="no GGUF file at"):
        Transformers(str(tmp_path / "no.gguf")).generate([user("Who?")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(tiny, user):
    prompts = [user(t) for t in TEXTS]
    asks = Asks(prompts, 2, 1.0, 6, prompts, ["Y", "N"], [(p, "Alps") for p in prompts])
    cpu = Transformers(tiny, dtype="float32", device="cpu").answer(asks)
    gpu = Transformers(tiny, dtype="float32", device="cuda").answer(asks)
    np.testing.assert_allclose(gpu.chosen, cpu.chosen, rtol=1e-2)
    for mine, theirs in zip(gpu.read, cpu.read, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-2)
    assert [len(texts) for texts in gpu.generated] == [2] * 6
