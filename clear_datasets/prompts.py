"""Every text that is sent to a model.

Each begins with the row's own prompt, so that an engine computes it once for all that is asked about the row; what
varies stands at the end. Texts of the data stand between other texts and are never interpreted.
"""

from __future__ import annotations

import re
from typing import Literal

from clear_datasets.engines import Messages

Form = Literal["direct", "plain", "reasoned"]  # of samples; reflection has no plain one

LABELS = ("Yes", "No")
VERDICTS = ("A", "B", "C")  # correct, incorrect, not sure
BETTER = ("First", "Second", "Tie")

_MARK = "Answer:"
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


def answer_of(text: str, form: Form) -> str:
    """The answer in a sample: all of it, or what stands behind the last mark of a reasoned one.

    Examples:
        >>> answer_of("Two and two make four. Answer: 4", "reasoned")
        '4'
    """
    return text.rsplit(_MARK, 1)[-1].strip() if form == "reasoned" else text


def incomplete(prompt: Messages) -> list[Messages]:
    r"""The prompt without its question, and the question alone, where there is anything beside it.

    The question is the paragraph that a label names ("Question:", "### Instruction:"), else the first or last one that
    ends with a question mark, else the shorter of these two: passages and inputs are long.

    Examples:
        >>> [p[0]["content"] for p in incomplete([{"role": "user", "content": "A passage.\n\nWho wrote it?"}])]
        ['A passage.', 'Who wrote it?']
        >>> incomplete([{"role": "user", "content": "One paragraph."}])
        [[{'role': 'user', 'content': ''}]]
    """
    *turns, last = prompt
    units = _units(last["content"].strip())
    named = [i for i, unit in enumerate(units) if _ASKS.match(unit)]
    ends = sorted((0, len(units) - 1), key=lambda i: (not units[i].rstrip().endswith("?"), len(units[i]), -i))
    asks = named[-1] if named else ends[0]
    rest = "\n\n".join(units[:asks] + units[asks + 1 :])
    texts = [rest, units[asks]] if rest and not named else [rest]
    return [[*turns, {**last, "content": text}] for text in texts]


# What may be tried at each place of a text is bounded: 100,000 line breaks or colons are no reason to hang.
_QUESTIONS = "question|query|instruction|task|problem"
_OTHERS = "context|passage|document|article|text|background|input|options|answer|response|output"
_ASKS = re.compile(rf"[#*\s]*(?:{_QUESTIONS})s?\b[^:\n]{{0,20}}:", re.I)
_LABEL = re.compile(rf"^(?=[#*]*\s{{0,99}}+(?:{_QUESTIONS}|{_OTHERS})s?\b[^:\n]{{0,20}}:)", re.I | re.M)
_CUE = re.compile(r"(?=.{0,999}\Z)\W*\w+(?:\W+\w+){0,4}\W*:\W*", re.S)  # "### Response:", "Answer:"


def _units(text: str) -> list[str]:
    """The labelled sections of a prompt where it has several, else its paragraphs; a heading stays with its text."""
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
