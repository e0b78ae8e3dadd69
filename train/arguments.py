"""A command line before it is parsed."""

import dataclasses
from pathlib import Path
from typing import Any


def take_config_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The path after --config, and the other arguments; raises ValueError if it is missing."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise ValueError("needs the path of a TOML file")
            return Path(arguments[i + 1]), arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config=")), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def is_torn(text: str) -> bool:
    """Whether `text` stands for bytes that are not UTF-8, as Python hands them over."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def capitalise_booleans(arguments: list[str], config: Any) -> list[str]:
    """Writes true and false, as TOML spells them, the way the parser wants: True and False.

    Args:
      arguments: a command line.
      config: a dataclass of dataclasses; only its boolean options are looked at.
    """
    booleans, words = _boolean_options(config), []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument in ("true", "false") and words and words[-1] in booleans:
            words.append(argument.capitalize())
        elif value in ("true", "false") and name in booleans:
            words.append(name + equals + value.capitalize())
        else:
            words.append(argument)
    return words


def _boolean_options(config: Any) -> set[str]:
    return {
        f"--{section.name}.{field.name.replace('_', '-')}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
        if field.type is bool
    }
