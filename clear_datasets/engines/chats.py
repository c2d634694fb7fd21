"""How a chat becomes the tokens of a model, by its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from clear_datasets.engines import Messages, PromptError

# Models that think aloud first would say neither a label nor an answer; other templates ignore the setting.
_ANSWERING = {"add_generation_prompt": True, "enable_thinking": False}
DATE = date(2024, 7, 26)  # what is today to a chat template that asks, on every day; Llama's own where it knows none
_CODES = ("-d", "-m", *"aAbBdHIjmMpSyY")
_PARTS = "".join(f"|replace('%{code}', '{DATE.strftime('%' + code)}')" for code in _CODES)
# A macro in place of the function, as transformers makes texts of functions that are given; its line end is trimmed.
_TODAY = "{% macro strftime_now(format) %}{{ format" + _PARTS + " }}{% endmacro %}\n"


@dataclass(frozen=True)
class Chats:
    """A tokenizer, and what the model says of its own tokens.

    No text of a row can end its turn and speak for somebody else by writing a token of the chat template, like
    "<|im_end|>": a prompt gets a space behind its first character, a response is encoded as the characters that it has.
    Two limits: a template whose turns are marked by plain words ("[INST]", or "Assistant:" where there is no template)
    cannot tell them from those of a row, and a server (`OpenAI`) reads texts by its own rules.

    Attributes:
        tokenizer: Of `transformers`.
        limit: Tokens of prompt and answer together.
        ends: Tokens that end an answer.
        end: The one of them that ends an answer in the chat template, or the tokenizer's eos.
        marks: Tokens that no text of the data may become, by id: special ones, and those of the chat template.
    """

    tokenizer: Any
    limit: int
    ends: frozenset[int]
    end: int
    marks: dict[int, str]

    @classmethod
    def of(cls, tokenizer: Any, limit: int, stated: int | list[int] | None) -> Chats:
        """The chats of a tokenizer, and of the ``eos_token_id`` that the model's generation config states."""
        every = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
        ends = frozenset(int(e) for e in every if e is not None)
        after, marks = _after_an_answer(tokenizer), _marks(tokenizer)
        end = next((token for token in after if token in ends), None)
        if end is None:  # a base model, say, whose eos ends documents: its samples may end by either
            ends |= {*after[:1]} & marks.keys()
            end = int(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else max(ends)
        return cls(tokenizer, limit, ends, end, marks)

    def response(self, text: str) -> list[int]:
        """Token ids of an answer and its end."""
        for options in ({}, {"split_special_tokens": True}):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, **options)
            if self.marks.keys().isdisjoint(ids):
                return [*ids, self.end]
        return [*self.tokenizer.encode(self._plain(text), add_special_tokens=False), self.end]

    def _plain(self, text: str) -> str:
        for mark in self.marks.values():
            if mark in text:
                text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text

    def encode(self, prompts: Sequence[Messages], reserve: Sequence[int]) -> list[list[int]]:
        """Token ids of each prompt, up to where the answer begins; `reserve` tokens each are kept free for it.

        Raises:
            PromptError: Some prompts leave too little room, or the chat template refuses them.
        """
        texts: list[str] = []
        reasons: dict[int, str] = {}
        for position, prompt in enumerate(prompts):
            try:
                texts.append(render(self.tokenizer, [{**m, "content": self._plain(m["content"])} for m in prompt]))
            except Exception as error:  # templates raise what they like: jinja2 errors, TypeError, ...
                reasons[position] = f"the chat template refuses this prompt: {error}"
                texts.append("")
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        for position, (tokens, room) in enumerate(zip(ids, reserve, strict=True)):
            if len(tokens) + room > self.limit:
                reasons.setdefault(
                    position,
                    f"the prompt has {len(tokens):,} tokens and {room:,} are kept for the answer, "
                    f"but the model takes {self.limit:,}: shorten the row, or use a model with a longer context",
                )
        if reasons:
            raise PromptError(reasons)
        return ids


def tokenizer_of(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with the chat template that comes with it.

    Raises:
        ValueError: It is made from ``tekken.json`` alone, and so has no chat template.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if hasattr(tokenization_auto, "_use_mistral_format"):  # older ones would keep the option as one of the tokenizer's
        options["mistral_format"] = False  # where mistral-common is installed, as vLLM has it, its own would be taken
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if type(tokenizer).__name__ == "MistralCommonBackend":
        raise ValueError(
            f"this transformers gives {source} the tokenizer of mistral-common, which has no chat template: "
            "pip install -U transformers"
        )
    if not tokenizer.chat_template and "tekken" in Path(getattr(tokenizer, "vocab_file", None) or "").name:
        raise ValueError(
            f"{source} has tekken.json, but neither tokenizer.json nor a chat template, and would be asked in a form "
            "that it never saw: put a chat_template.jinja beside it, or take a checkpoint that has one"
        )
    return tokenizer


def render(tokenizer: Any, messages: Messages) -> str:
    """The text of a chat, by the tokenizer's chat template, or plainly where it has none."""
    if not tokenizer.chat_template:
        turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
        return "\n\n".join([*turns, "Assistant:"])
    template = tokenizer.get_chat_template()
    dated = {"chat_template": _TODAY + template} if "strftime_now" in template else {}
    settings = {**_ANSWERING, **dated, "tokenize": False}
    try:
        text: str = tokenizer.apply_chat_template(list(messages), **settings)
    except Exception:
        if not messages or messages[0]["role"] != "system" or len(messages) < 2:
            raise
        text = tokenizer.apply_chat_template(without_system(messages), **settings)
    return text


def without_system(messages: Messages) -> list[dict[str, str]]:
    r"""The chat with the system's text at the beginning of the first turn: some templates have no system role.

    Examples:
        >>> without_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}])
        [{'role': 'user', 'content': 'Be brief.\n\nWho?'}]
    """
    first = {**messages[1], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return [first, *messages[2:]]


def _marks(tokenizer: Any) -> dict[int, str]:
    """Special tokens, and those with which the chat template begins and ends turns: not all of these are special."""
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        shape = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False)) if tokenizer.chat_template else []
    except Exception:  # as above; its special tokens are known all the same
        shape = []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {i: t.content for i, t in added.items() if t.special or i in shape}
    return {i: text for i, text in marks.items() if len(text.strip()) > 1}  # a line break is no mark


def _after_an_answer(tokenizer: Any) -> list[int]:
    """What the chat template puts behind an answer; nothing where there is none."""
    if not tokenizer.chat_template:
        return []
    said = "Seven"
    chat = [{"role": "user", "content": "Say a number."}, {"role": "assistant", "content": said}]
    _, found, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(said)
    ids: list[int] = tokenizer.encode(after, add_special_tokens=False) if found else []
    return ids
