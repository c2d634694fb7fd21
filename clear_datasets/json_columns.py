"""Values of any JSON, `datasets.Json`, exactly: `map` takes a text there for JSON, and reading rounds numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def has_json(feature: Any) -> bool:
    """Whether values of any JSON stand in a column, or in a whole schema."""
    if isinstance(feature, Mapping):
        return any(map(has_json, feature.values()))
    return has_json(feature.feature) if hasattr(feature, "feature") else _is_json(feature)


def decoded(stored: Any, feature: Any) -> Any:
    """The value of what is stored.

    Examples:
        >>> from datasets import Json, List
        >>> decoded(['"4"', "4", "0.1234567890123456"], List(Json()))
        ['4', 4, 0.1234567890123456]
    """
    return _walked(stored, feature, json.loads)


def encoded(value: Any, feature: Any) -> Any:
    """What to store of a value.

    Examples:
        >>> from datasets import Json, List, Value
        >>> encoded([{"role": "user", "content": "4"}], List({"role": Value("string"), "content": Json()}))
        [{'role': 'user', 'content': '"4"'}]
    """
    return _walked(value, feature, json.dumps)


def _walked(value: Any, feature: Any, change: Any) -> Any:
    if value is None:
        return None
    if _is_json(feature):
        return change(value)
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _walked(value.get(name), inner, change) for name, inner in feature.items()}
    if hasattr(feature, "feature") and isinstance(value, list):
        return [_walked(one, feature.feature, change) for one in value]
    return value


def _is_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json" and bool(feature.decode)  # datasets 4 has no such type
