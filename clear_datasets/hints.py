"""What is said once a process, as a warning, of settings that do not suit the rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

_RESULT = re.compile(r"^####[ \t]*\S|\\boxed\{", re.MULTILINE)


def hint_at_results(responses: Sequence[str]) -> None:
    """Say what solutions want, where they are most targets of a batch that is compared by its words."""
    if 2 * sum(bool(_RESULT.search(response)) for response in responses) > len(responses):
        warnings.warn(
            "most targets are solutions that end in a result ('#### 12', '\\boxed{12}'). The default compares whole "
            "texts: it finds a solution of another question, and hardly a wrong one (AUROC .54 on GSM8K with 0.5B). "
            "BSDetector.math() (--math) compares results (.76), for many times the tokens",
            stacklevel=3,
        )


def hint_at_length(cut: Sequence[bool], max_tokens: int) -> None:
    """Say what long targets want, where more than a fifth of a batch's samples is `cut` off at `max_tokens`."""
    if 5 * sum(cut) > len(cut):
        warnings.warn(
            f"more than a fifth of the samples is cut off at max_tokens={max_tokens}, and compared as far as it goes: "
            f"BSDetector(max_tokens={4 * max_tokens}) or BSDetector.math(max_tokens={4 * max_tokens}) has more room. "
            "Samples hardly measure long or open-ended targets; BSDetector(alpha=0) does without them",
            stacklevel=3,
        )
