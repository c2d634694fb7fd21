from __future__ import annotations

import pytest

from clear_datasets.prompts import incomplete

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
    ("Answer:", [""]),
    ("", [""]),
]


@pytest.mark.parametrize("text, parts", CASES)
def test_incomplete_prompts_lack_the_question_wherever_it_stands(text, parts):
    system = {"role": "system", "content": "Be brief."}
    prompt = [system, {"role": "user", "content": text}]
    assert incomplete(prompt) == [[system, {"role": "user", "content": part}] for part in parts]
    assert prompt[1]["content"] == text
