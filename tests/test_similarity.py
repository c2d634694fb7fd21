from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher

from clear_datasets import LLM, NLI, BSDetector, ByConfidence, Clear, Embedding, FinalAnswer, Jaccard
from clear_datasets.engines import PromptError
from clear_datasets.engines.transformers import Transformers
from tests.conftest import Scripted, make_tiny

PAIRS = [("the Alps", "In the Alps."), ("Rhine", "Rhine"), ("Rhine", "Main"), ("the Alps", "In the Alps.")]


@pytest.mark.parametrize(
    "a, b, score",
    [
        ("Rhine", "the rhine!", 1.0),
        ("Rhine", "Main", 0.0),
        ("1,200 people", "1200", 0.5),
        ("3.5", "35", 0.0),
        ("!?", "!?", 1.0),
        ("!?", "...", 0.0),
        ("", "x", 0.0),
        ("東京 です", "東京 です", 1.0),
        ("東京", "東京都", 2 / 3),
        ("A", "A.", 1.0),
        ("A", "B", 0.0),
        ("-5", "5", 0.0),
        ("1990-1995", "1990", 0.5),
        ("की", "का", 0.0),
        ("หมา", "หมี", 0.0),
        ("cafe\u0301", "café", 1.0),
        ("GPT模型可以生成文本", "GPT模型能生成文本", 7 / 10),
        ("人々が住む", "人が住む", 4 / 5),
        ("二〇〇〇年", "二〇〇一年", 3 / 4),
        ("\U00020bb7\U00020bb8家", "\U00020bb7家", 2 / 3),
        ("\u22125", "-5", 1.0),
        ("It is \u22125", "It is 5", 2 / 4),
        ("\uff11,\uff12\uff10\uff10", "1200", 1.0),
        ("٣", "3", 1.0),
        ("1876,1877", "1877", 0.5),
        ("1,200, 1,300", "1300 1200", 1.0),
        (".5", "0.5", 1.0),
        ("-.5 m", "-0.5 m", 1.0),
        ("...5", "5", 1.0),
        ("Great 👍", "Great 👎", 1 / 3),
        ("✅", "❌", 0.0),
    ],
)
def test_jaccard_compares_words(a, b, score):
    assert Jaccard()([(a, b)], None) == pytest.approx([score])


@pytest.mark.parametrize(
    "a, b, score",
    [
        ("She has 5+3=<<5+3=8>>8 eggs.\n#### 8", "5 and 3 make 8.", 1),
        ("#### 8", "The answer is 9.", 0),
        ("It costs $1,200.", "1200 dollars", 1),
        ("So \\boxed{\\frac{1}{2}} of them", "0.5", 1),
        ("x = 3, so 9 are left", "9", 1),
        ("-8", "8", 0),
        ("#### 8", "I do not know.", 0),
        ("The Alps", "8", math.nan),
        ("#### 18\n\nNote: 2 checks.", "18", 1),
        ("30 girls answered 9.\n#### 18", "18", 1),
        ("#### $1,800\r\nNote 3", "1800", 1),
        ("#### 18 eggs\nNote 3", "18", 1),
        ("#### 1. Add them up\nIt is 5.", "5", 1),
        ("#### Step 3\nIt is 5.", "5", 1),
        ("\\boxed{18}\n\nNote: 2 checks.", "18", 1),
        ("It is \u22125.", "-5", 1),
        ("#### \uff11\uff18", "18", 1),
        ("9^9^9^9^9", "3", 0),
        ("9^9^9^9^9", "9^9^9^9^9", 1),
        ("", "", math.nan),
        ("\ud800 7", "\x00 7", 1),
    ],
)
def test_final_answers_are_compared_as_numbers(a, b, score):
    pytest.importorskip("math_verify")
    assert FinalAnswer()([(a, b)], None) == pytest.approx([score], nan_ok=True)


def test_final_answers_of_a_thread_are_refused_as_nothing_could_end_them():
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="main thread alone"):
        pool.submit(FinalAnswer(), [("8", "8")], None).result()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random three-label classifier, and the folder of one with the labels in another order."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folders = []
    for names in (
        ["contradiction", "neutral", "entailment"],
        ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"],
        ["yes", "no"],
    ):
        folder = tmp_path_factory.mktemp("nli")
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz."]
        vocabulary += ["##" + c for c in "abcdefghijklmnopqrstuvwxyz"]
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
        BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=32).save_pretrained(folder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=40, id2label=dict(enumerate(names)), initializer_range=0.5,
        )  # fmt: skip
        model = BertForSequenceClassification(config).eval()
        if names[0] == "ENTAILMENT":  # the same function with its outputs in the other order
            model.classifier.weight.data = model.classifier.weight.data.flip(0)
            model.classifier.bias.data = model.classifier.bias.data.flip(0)
        model.save_pretrained(folder)
        folders.append(folder)
    return folders


def contradiction(folder: Path, a: str, b: str) -> float:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return float(model(**tokenizer(a, b, return_tensors="pt")).logits.softmax(-1)[0, 0])


def test_nli_is_one_minus_contradiction_in_both_orders(classifier):
    found = NLI(str(classifier[0]), batch_size=2)(PAIRS, None)
    wanted = [1 - (contradiction(classifier[0], a, b) + contradiction(classifier[0], b, a)) / 2 for a, b in PAIRS]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert len(set(np.round(found, 4))) == 3


def test_nli_reads_the_label_order_from_the_config(classifier):
    np.testing.assert_allclose(NLI(str(classifier[1]))(PAIRS, None), NLI(str(classifier[0]))(PAIRS, None), atol=1e-5)


def test_nli_takes_texts_longer_than_its_positions_and_refuses_other_classifiers(classifier):
    assert 0 <= NLI(str(classifier[0]))([("word " * 300, "other " * 300)], None)[0] <= 1
    with pytest.raises(ValueError, match="has the labels yes, no; NLI needs one named contradiction"):
        NLI(str(classifier[2]))(PAIRS, None)


def test_the_papers_configuration_from_end_to_end(classifier, tmp_path):
    engine = Transformers(str(make_tiny(tmp_path, ends=8.0, max_position_embeddings=4096)), dtype="float32")
    paper = replace(BSDetector.paper(), similarity=NLI(str(classifier[0])), max_tokens=32)
    rows = {"prompt": ["Where does the Rhine rise?", "Where is Basel?"], "response": ["In the Alps", "On the Rhine"]}
    scored = Dataset.from_dict(rows).map(Clear(engine=engine, confidence=paper).score, batched=True)
    # A random model may say no verdict at all; then its row says so, and has the other part.
    for row in scored:
        assert 0 <= row["clear_consistency"] <= 1
        assert (row["clear_error"] == "") == (0 <= row["clear_confidence"] <= 1)


def test_embedding_is_the_cosine_of_mean_states(classifier):
    found = Embedding(str(classifier[0]), batch_size=2)(PAIRS, None)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert 0 <= found.min() <= found[2] < 0.999
    assert found[0] == found[3]


def test_llm_asks_the_same_model_in_both_orders(tmp_path):
    found = LLM()(PAIRS, Scripted(yes=("Alps",)))
    np.testing.assert_allclose(found, [0.9, 1.0, 0.2, 0.9], atol=1e-6)
    engine = Transformers(str(make_tiny(tmp_path)), dtype="float32")
    real = LLM()([("Rhine", "Main"), ("Main", "Rhine")], engine)
    assert real[0] == real[1] or math.isnan(real[0])


def test_llm_gives_nan_to_pairs_that_are_too_long():
    found = LLM()([("x" * 20_000, "y"), ("Rhine", "Main")], Scripted())
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.2)


@dataclass(frozen=True)
class Overflowing(Scripted):
    """Finds out as it answers, and not before, that it has no numbers for some prompts."""

    def choose(self, prompts, labels):
        found = super().choose(prompts, labels)
        if broken := [i for i, p in enumerate(prompts) if "Main" in p[-1]["content"]]:
            raise PromptError(dict.fromkeys(broken, "no numbers"))
        return found


def test_what_a_model_cannot_compare_ends_no_batch():
    found = LLM()([("x" * 20_000, "y"), ("Rhine", "Main"), ("Rhine", "the Rhine")], Overflowing())
    assert np.isnan(found[:2]).all()
    assert found[2] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [NLI, Embedding])
def test_an_encoder_that_was_trained_again_in_its_place_compares_anew(classifier, tmp_path, kind):
    from transformers import BertForSequenceClassification

    folder = shutil.copytree(classifier[0], tmp_path / "encoder")
    detector = BSDetector(k=1, alpha=1, beta=1, similarity=kind(str(folder)))
    rows = {"prompt": ["Where does the Rhine rise?"], "response": ["In the Alps"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")  # which map keeps its results beside
    ds = Dataset.load_from_disk(str(tmp_path / "rows"))
    clear = Clear(engine=Scripted(answers=(("Rhine", "in high mountains"),)), confidence=detector)
    judging = Clear(engine=clear.engine, preference=ByConfidence(detector))
    before = Hasher.hash(clear.score), Hasher.hash(judging.prefer)
    first = ds.map(clear.score, batched=True)
    assert ds.map(clear.score, batched=True).cache_files == first.cache_files != []
    model = BertForSequenceClassification.from_pretrained(folder)
    for weights in model.parameters():
        weights.data = weights.data.flip(0)
    model.save_pretrained(folder)
    assert before[0] != Hasher.hash(clear.score)
    assert before[1] != Hasher.hash(judging.prefer)
    again = ds.map(clear.score, batched=True)["clear_confidence"][0]
    fresh = kind(str(shutil.copytree(folder, tmp_path / "elsewhere")))
    assert again == pytest.approx(fresh([("In the Alps", "in high mountains")], None)[0], abs=1e-6)
    assert abs(again - first["clear_confidence"][0]) > 1e-3


def test_an_encoder_may_be_given_as_a_path(classifier):
    for kind in (NLI, Embedding):
        one, other = kind(classifier[0]), kind(str(classifier[0]))
        assert (one, repr(one), Hasher.hash(one)) == (other, repr(other), Hasher.hash(other))
