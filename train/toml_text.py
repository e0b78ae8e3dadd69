"""Configs as TOML text, and TOML as command-line arguments."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any


def flatten(table: dict, prefix: str = "") -> Iterator[str]:
    """Yields a TOML table as arguments: {"fp8": {"margin": 0}} -> --fp8.margin 0.

    Raises:
      ValueError: a text begins with "--".
    """
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            words = [str(word) for word in (value if isinstance(value, list) else [value])]
            for word in words:
                # It would be read as an option of its own.
                if word.startswith("--"):
                    raise ValueError(f"{prefix}{key} = {word!r} must not begin with --")
            yield f"--{prefix}{key}".replace("_", "-")
            yield from words


def to_toml(config: Any) -> str:
    """A config (a dataclass of dataclasses) as TOML text that `parse` reads back as it was."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            lines.append(f"{field.name} = {_toml_value(getattr(values, field.name))}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, save that TOML wants one for DEL too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
