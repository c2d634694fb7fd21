from __future__ import annotations

import pytest

from clear_datasets.prompts import answer_of, incomplete

CASES = [
    ("The Rhine rises in the Alps.\n\nWhere does it rise?", ["The Rhine rises in the Alps.", "Where does it rise?"]),
    ("Where does it rise?\n\nThe Rhine rises in the Alps.", ["The Rhine rises in the Alps.", "Where does it rise?"]),
    ("First paragraph.\n\nSecond paragraph.\n\nWho?", ["First paragraph.\n\nSecond paragraph.", "Who?"]),
    ("Sum it up.\n\nFirst paragraph.\n\nThe second one.", ["First paragraph.\n\nThe second one.", "Sum it up."]),
    ("Context: The Rhine rises.\nQuestion: Where?\nAnswer:", ["Context: The Rhine rises."]),
    ("The Rhine rises.\n\nQuestion: Where?\n\nAnswer:", ["The Rhine rises."]),
    (
        "Below is a task. Answer it.\n\n### Instruction:\nSum it up.\n\nBriefly.\n\n### Input:\nOne.\n\nTwo.\n\n"
        "### Response:",
        ["Below is a task. Answer it.\n\n### Input:\nOne.\n\nTwo.\n### Response:"],
    ),
    ("Question: a?\nAnswer: b\n\nQuestion: c?\nAnswer:", ["Question: a?\n\nAnswer: b"]),
    ("Which is it?\nA. this\nB. that", [""]),
    ("Write a poem.", [""]),
    ("The Rhine rises.\nIn the Alps.\nWhere?", ["The Rhine rises.\nIn the Alps.", "Where?"]),
    ("莱茵河发源于阿尔卑斯山。\n在哪里\uff1f", ["莱茵河发源于阿尔卑斯山。", "在哪里\uff1f"]),
    ("莱茵河\uff1f\n\n它发源于阿尔卑斯山。", ["它发源于阿尔卑斯山。", "莱茵河\uff1f"]),
    ("ينبع نهر الراين.\n\nمن أين ينبع النهر الطويل؟", ["ينبع نهر الراين.", "من أين ينبع النهر الطويل؟"]),
    ("Which question helps?\nA. Is it warm?\nB. Is it old?", [""]),
    ("Answer both:\n- Who?\n- Why?", [""]),
    ("Question: It rises.\nWhere?", [""]),
    ("Tasks in the plan: a, b.\n\nWho wrote it?", ["Tasks in the plan: a, b.", "Who wrote it?"]),
    ("Question: Is it so, as is said of it?\n\nIt is. Is it?", ["It is. Is it?"]),
    ("Is it so? Is it?\n\nQuestion: Where?\n\nAnswer:", ["Is it so? Is it?"]),
    ("Answer:", [""]),
    ("", [""]),
]


@pytest.mark.parametrize("text, parts", CASES)
def test_incomplete_prompts_lack_the_question_wherever_it_stands(text, parts):
    system = {"role": "system", "content": "Be brief."}
    prompt = [system, {"role": "user", "content": text}]
    assert incomplete(prompt) == [[system, {"role": "user", "content": part}] for part in parts]
    assert prompt[1]["content"] == text


@pytest.mark.parametrize(
    "text, form, cut, answer",
    [
        ("So. Answer: 4", "reasoned", False, "4"),
        ("Answer: 3\n\nOr rather, Answer: 4\n\n5", "reasoned", True, "4\n\n5"),  # as ever, where the very mark is
        ("So it is.\n**Final answer:** 4\n\nNote: 2 checks.", "reasoned", False, "4"),
        ("So it is.\n**Answer**: 4", "reasoned", True, "4"),
        ("**Answer**: 3, no, ANSWER\uff1a **4**", "reasoned", False, "4"),
        ("It is 4.", "reasoned", False, "It is 4."),
        ("It is 4, as 2 and", "reasoned", True, None),
        ("So. Answer:", "reasoned", True, None),
        ("It is 4, as 2 and", "direct", True, "It is 4, as 2 and"),
        ("", "direct", False, ""),
        ("  ", "direct", True, None),
        ("<think>It is 3. Answer: 3</think>\n\n4", "direct", False, "\n\n4"),
        ("It is 3.</think>4", "plain", True, "4"),  # a template that begins the thoughts itself
        ("<think>It is 3. Answer: 3</think>Answer: 4", "reasoned", False, "4"),
        ("<think>It is 3. Answer: 3", "reasoned", True, None),
        ("\n<think>It is", "plain", False, None),
        ("<think></think>", "direct", False, None),
        ("Write <think> first.", "direct", False, "Write <think> first."),
    ],
)
def test_the_answer_stands_behind_thoughts_and_marks(text, form, cut, answer):
    assert answer_of(text, form, cut) == answer
