"""Every text that is sent to a model.

Each begins with the row's own prompt, so that an engine computes it once for all that is asked about the row; what
varies stands at the end. Texts of the data stand between other texts and are never interpreted.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Literal

from clear_datasets.engines import Answers, Messages

Form = Literal["direct", "plain", "reasoned"]  # of samples; reflection has no plain one

LABELS = ("Yes", "No")
VERDICTS = ("A", "B", "C")  # correct, incorrect, not sure
BETTER = ("First", "Second", "Tie")

_MARK = "Answer:"
_MARKS = re.compile(r"\*{0,3}(?:final )?answer\*{0,3}\s{0,9}[:\uff1a]", re.I)  # "**Final answer**:"
_SAMPLE = {
    "direct": "Reply with the answer alone, without any explanation.",
    "reasoned": f"Think step by step and write down your reasoning. Then begin a last line with {_MARK!r} "
    "and write the answer alone behind it.",
}
_REASONS = (
    "Check step by step whether the proposed answer is correct, and explain what speaks for it and against it.",
    "Are you really sure that the proposed answer is correct? Go through it once more, and explain what you find.",
)


def sample(prompt: Messages, form: Form) -> Messages:
    r"""Ask for the model's own answer; a plain sample has nothing but the row's own prompt.

    Examples:
        >>> sample([{"role": "user", "content": "2 + 2?"}], "direct")
        [{'role': 'user', 'content': '2 + 2?\n\nReply with the answer alone, without any explanation.'}]
    """
    return _append(prompt, _SAMPLE[form]) if form in _SAMPLE else prompt


def answer_of(text: str, form: Form, cut: bool = False) -> str | None:
    """The answer in a sample: what stands behind its thinking, of a reasoned one behind its last mark.

    Args:
        text: The sample.
        form: How it was asked for.
        cut: Whether it is cut off at its limit.

    Returns:
        The answer, or None where the sample ends before it. A reasoned sample that was not cut off and has no mark is
        an answer as it stands.

    Examples:
        >>> answer_of("Two and two make four. Answer: 4", "reasoned")
        '4'
        >>> answer_of("<think>Two and two?</think>4", "direct"), answer_of("<think>Two and", "direct")
        ('4', None)
    """
    _, thought, said = text.rpartition("</think>")
    marked = _behind_mark(said) if form == "reasoned" else said
    if said.lstrip().startswith("<think>") or (marked is None and cut):
        return None
    said = said.strip() if marked is None else marked
    return said if said.strip() or not (cut or thought) else None


def answers_of(answers: Answers, form: Form) -> list[str | None]:
    """`answer_of` each sample of a row."""
    cuts = answers.cut or [[False] * len(texts) for texts in answers.generated]
    samples = zip(chain(*answers.generated), chain(*cuts), strict=True)
    return [answer_of(text, form, cut) for text, cut in samples]


def _behind_mark(text: str) -> str | None:
    """All behind the mark that was asked for, or else the first paragraph behind one that models like better."""
    if _MARK in text:
        return text.rpartition(_MARK)[2].strip()
    *before, behind = _MARKS.split(text)
    return re.split(r"\n\s*\n", behind.strip("* \n"))[0] if before else None


def incomplete(prompt: Messages) -> list[Messages]:
    r"""The prompt without its question, and the question alone, where there is anything beside it.

    The question is the paragraph that a label names ("Question:", "### Instruction:"), else the first or last one that
    ends with a question mark, else the shorter of these two: passages and inputs are long. A label that stands alone
    may be a heading ("Tasks in the plan:"), and yields to a question mark.

    Examples:
        >>> [p[0]["content"] for p in incomplete([{"role": "user", "content": "A passage.\n\nWho wrote it?"}])]
        ['A passage.', 'Who wrote it?']
        >>> incomplete([{"role": "user", "content": "One paragraph."}])
        [[{'role': 'user', 'content': ''}]]
    """
    *turns, last = prompt
    text = last["content"].strip()
    units = _units(text)
    named = [i for i, unit in enumerate(units) if _ASKS.match(unit)]
    ends = sorted((0, len(units) - 1), key=lambda i: (not _is_question(units[i]), len(units[i]), -i))
    heading = named and len(_LABEL.findall(text)) == 1 and not _is_question(units[named[-1]])
    asks = named[-1] if named and not (heading and _is_question(units[ends[0]])) else ends[0]
    rest = "\n\n".join(units[:asks] + units[asks + 1 :])
    parts = [rest, units[asks]] if rest and asks not in named else [rest]
    return [[*turns, {**last, "content": part}] for part in parts]


def _is_question(text: str) -> bool:
    return text.rstrip().endswith(("?", "\uff1f", "\u061f"))  # also of Chinese and Japanese, and of Arabic


# What may be tried at each place of a text is bounded: 100,000 line breaks or colons are no reason to hang.
_QUESTIONS = "question|query|instruction|task|problem"
_OTHERS = "context|passage|document|article|text|background|input|options|answer|response|output"
_ASKS = re.compile(rf"[#*\s]*(?:{_QUESTIONS})s?\b[^:\n]{{0,20}}:", re.I)
_LABEL = re.compile(rf"^(?=[#*]*\s{{0,99}}+(?:{_QUESTIONS}|{_OTHERS})s?\b[^:\n]{{0,20}}:)", re.I | re.M)
_OPTION = re.compile(r"\W{0,9}\w[.):]\s|\s*[-*\u2022]\s")  # "A. Is it?", "(2) Why?", "- Who?"
_CUE = re.compile(r"(?=.{0,999}\Z)\W*\w+(?:\W+\w+){0,4}\W*:\W*", re.S)  # "### Response:", "Answer:"


def _units(text: str) -> list[str]:
    """The labelled sections of a prompt where it has several, else its paragraphs; a heading stays with its text.

    The last line of a single paragraph is a unit where it is a question, and none of the options of one.
    """
    sections = _LABEL.split(text)
    split = sections if sum(bool(_LABEL.match(s)) and not _CUE.fullmatch(s) for s in sections) > 1 else None
    units: list[str] = []
    for unit in (piece.strip("\n") for piece in split or re.split(r"\n\s*\n", text) if piece.strip()):
        if units and _CUE.fullmatch(units[-1]):
            units[-1] += "\n" + unit
        else:
            units.append(unit)
    if len(units) > 1 and _CUE.fullmatch(units[-1]):
        units[-2:] = ["\n".join(units[-2:])]
    if len(units) == 1 and not _ASKS.match(units[0]):
        before, _, line = units[0].rpartition("\n")
        units = [before, line] if before and _is_question(line) and not _OPTION.match(line) else units
    return units or [""]


def reflect(prompt: Messages, response: str) -> list[Messages]:
    """Ask whether a response is right, with the two labels in either order, to be answered by one of `LABELS`."""
    question = f"Proposed answer: {response}\n\nIs the proposed answer correct?"
    return [_append(prompt, f"{question} Reply {a} or {b}.") for a, b in (LABELS, LABELS[::-1])]


def consider(prompt: Messages, response: str) -> list[Messages]:
    """Ask for the reasons for and against a response, before any verdict: two questions, each of its own."""
    proposed = f"Proposed answer: {response}\n\n"
    return [_append(prompt, proposed + question) for question in _REASONS]


def verdict(considered: Messages, explanation: str) -> Messages:
    """Ask for the verdict after an explanation, to be answered by one of `VERDICTS`."""
    choices = "Is the proposed answer\nA. correct\nB. incorrect\nC. not sure\nReply with the letter alone."
    return [*considered, {"role": "assistant", "content": explanation}, {"role": "user", "content": choices}]


def better(prompt: Messages, first: str, second: str) -> Messages:
    """Ask which of two responses is better, to be answered by one of `BETTER`."""
    question = (
        f"First answer: {first}\n\nSecond answer: {second}\n\nWhich answer is better? Reply First, Second or Tie."
    )
    return _append(prompt, question)


def same(first: str, second: str) -> Messages:
    """Ask whether two answers say the same, to be answered by one of `LABELS`."""
    question = f"First answer: {first}\n\nSecond answer: {second}\n\nDo the two answers say the same? Reply Yes or No."
    return [{"role": "user", "content": question}]


def _append(prompt: Messages, text: str) -> list[dict[str, str]]:
    *turns, last = prompt
    if last["role"] == "user":
        return [*turns, {"role": "user", "content": f"{last['content']}\n\n{text}"}]
    return [*prompt, {"role": "user", "content": text}]
