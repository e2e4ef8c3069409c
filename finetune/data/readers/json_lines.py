"""JSON of training data: `modeling_pisces.records.json_values`, with what cannot be used as a `DataError`."""

from typing import Any

from finetune.data.schema import DataError
from modeling_pisces.records import json_values
from modeling_pisces.records.json_values import BadValue, skip_blank


def parse_json(content: bytes) -> Any:
    """As `json_values.parse_json`.

    Raises:
        DataError: the value cannot be used.
        ValueError: not UTF-8 (`UnicodeDecodeError`), or not JSON (`json.JSONDecodeError`).
    """
    try:
        return json_values.parse_json(content)
    except BadValue as error:
        raise DataError(str(error)) from None


def parse_value(text: str, position: int) -> tuple[Any, int]:
    """As `json_values.parse_value`; a value that cannot be used comes as a `DataError`."""
    value, end = json_values.parse_value(text, position)
    return (DataError(str(value)) if isinstance(value, BadValue) else value), end


__all__ = ["parse_json", "parse_value", "skip_blank"]
