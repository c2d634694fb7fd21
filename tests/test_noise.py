from __future__ import annotations

import json
import re

import pytest
from datasets import Dataset

from clear_datasets import Columns, noise

PASSAGES = [
    f"River {i} is long and wide. It rises in valley {i} of the Alps. Nobody at all swims in it." for i in range(20)
]
SQUAD = Dataset.from_list(
    [
        {"context": p, "question": f"Where does river {i} rise?", "answer": f"in valley {i} of the Alps"}
        for i, p in enumerate(PASSAGES)
    ]
    + [{"context": p, "question": f"Who swims in river {i}?", "answer": "Nobody"} for i, p in enumerate(PASSAGES)]
)
JSON = Dataset.from_list(
    [{"prompt": f"Mail {i}", "response": json.dumps({"topic": f"t{i}", "n": [i]})} for i in range(20)]
)

MAKERS = [
    (noise.wrong_sentence, SQUAD),
    (noise.other_answer, SQUAD),
    (noise.swap, JSON),
    (noise.truncate, SQUAD.select(range(20))),
    (noise.corrupt_json, JSON),
    (noise.wrong_number, JSON),
]


@pytest.mark.parametrize("make, ds", MAKERS)
def test_noise_is_marked_seeded_and_can_be_undone(make, ds):
    target = "answer" if "answer" in ds.column_names else "response"
    noisy = make(ds, fraction=0.25, seed=3)
    assert noisy["noise"][:].count(make.__name__) == len(ds) // 4
    for clean, row in zip(ds, noisy, strict=True):
        assert row["noise_original"] == clean[target]
        assert (row[target] != clean[target]) == bool(row["noise"])
        assert {k: row[k] for k in clean if k != target} == {k: v for k, v in clean.items() if k != target}
    assert make(ds, fraction=0.25, seed=3)[:] == noisy[:]
    assert make(ds, fraction=0.25, seed=4)["noise"][:] != noisy["noise"][:]
    assert set(make(ds, fraction=0)["noise"]) == {""}
    with pytest.raises(ValueError, match="fraction is 2"):
        make(ds, fraction=2)


@pytest.mark.parametrize("make, ds", MAKERS)
@pytest.mark.parametrize("kind", ["arrow", "numpy"])
def test_noise_is_that_of_plain_rows_in_any_format_which_stays(make, ds, kind):
    noisy = make(ds.with_format(kind), fraction=0.25)
    assert noisy.format["type"] == kind
    assert noisy.with_format(None)[:] == make(ds, fraction=0.25)[:]


def test_wrong_sentences_come_from_the_passage_and_lack_the_answer():
    for row in noise.wrong_sentence(SQUAD, fraction=1):
        assert row["answer"] in row["context"]
        assert row["noise_original"].lower() not in row["answer"].lower()


def test_the_passage_is_the_column_of_the_format():
    form = Columns("q", "a", context="passage")
    named = SQUAD.rename_columns({"context": "passage", "question": "q", "answer": "a"})
    for make in (noise.wrong_sentence, noise.other_answer):
        wanted = make(SQUAD, fraction=0.5)["answer"][:]
        assert make(named, fraction=0.5, format=form)["a"][:] == wanted
        assert make(named, fraction=0.5, format=Columns("q", "a"), context="passage")["a"][:] == wanted
        assert make(named.rename_column("passage", "context"), 0.5, format=Columns("q", "a"))["a"][:] == wanted


def test_other_answers_are_answers_on_the_same_passage():
    for row in noise.other_answer(SQUAD, fraction=1):
        assert row["answer"] in SQUAD.filter(lambda r, c=row["context"]: r["context"] == c)["answer"][:]


@pytest.mark.parametrize(
    "target", ["1 + 10 = 11.\n#### 11", "in 1,200 days, or 3.5 years", "7", "A2 and B12: 12% of 120 is 0.12, not 12"]
)
def test_a_wrong_number_is_the_last_one_with_another_digit_wherever_it_stands(target):
    ds = Dataset.from_dict({"question": [f"{i}?" for i in range(50)], "answer": [target] * 50})
    found = noise.wrong_number(ds, fraction=1)["answer"][:]
    last = re.findall(r"\d[\d,.]*\d|\d", target)[-1]
    parts = re.split(rf"(?<![\d,.]){re.escape(last)}(?!\d|[,.]\d)", target)
    news = {new[len(parts[0]) :][: len(last)] for new in found}
    assert set(found) == {new.join(parts) for new in news}
    assert len(news) > 5
    assert all(sum(a != b for a, b in zip(new, last, strict=True)) == 1 for new in news)
    assert all(float(new.replace(",", "")) != float(last.replace(",", "")) for new in news)
    assert not any(len(new) > 1 and re.match(r"0\d", new) for new in news)


def test_swapped_targets_are_a_permutation():
    noisy = noise.swap(JSON, fraction=0.5)
    assert sorted(noisy["response"]) == sorted(JSON["response"])


def test_swap_gives_every_row_another_target_even_where_many_are_equal():
    ds = Dataset.from_dict({"prompt": list("abcdefgh"), "response": list("xxxxyyzz")})
    assert all(r["response"] != r["noise_original"] for r in noise.swap(ds, fraction=1))
    with pytest.raises(ValueError, match="8 rows are to exchange targets but 5 of them have the same one"):
        noise.swap(Dataset.from_dict({"prompt": list("abcdefgh"), "response": list("xxxxxyyz")}), fraction=1)


def test_truncated_targets_are_beginnings_and_corrupt_json_does_not_parse():
    for row in noise.truncate(SQUAD.select(range(20)), fraction=1):
        assert row["noise_original"].startswith(row["answer"])
        assert 0.2 < len(row["answer"]) / len(row["noise_original"]) < 0.8
    for row in noise.corrupt_json(JSON, fraction=1):
        with pytest.raises(ValueError):
            json.loads(row["response"])


def test_noise_on_noise_is_refused():
    with pytest.raises(ValueError, match="has a column 'noise' already"):
        noise.swap(noise.truncate(SQUAD.select(range(20))))


def test_too_few_rows_that_can_be_made_wrong():
    with pytest.raises(ValueError, match="20 of 20 rows are to get corrupt_json, but only 0 can"):
        noise.corrupt_json(SQUAD.select(range(20)), fraction=1)


def test_swap_gives_no_row_what_says_the_same():
    ds = Dataset.from_list(
        [{"prompt": f"{i}?", "response": r} for i, r in enumerate(["no", "No.", "Yes.", "yes", "!", "?"] * 4)]
    )
    for seed in range(5):
        for row in noise.swap(ds, fraction=1, seed=seed):
            assert row["response"].lower().strip(".") != row["noise_original"].lower().strip(".")
