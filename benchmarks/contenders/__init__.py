"""The trainers that `benchmarks.train_step` times, each in a process of its own.

A contender's module has `run(task) -> dict`; `task` is the parent's JSON (see `__main__`), the
result holds what only the process itself can know: step times, memory, loss, device, versions.
"""

import re

MODULES = {
    "ours": "benchmarks.contenders.ours",
    "flax": "benchmarks.contenders.flax_linen",
    "torch": "benchmarks.contenders.torch_compile",
    "torchao": "benchmarks.contenders.torch_compile",
}
VARIANTS = {
    "ours": ("bf16", "delayed", "current"),
    "flax": ("bf16", "fp8", "bf16-unroll", "fp8-unroll"),
    "torch": ("bf16",),
    "torchao": ("tensorwise", "rowwise"),
}
_NAME = re.compile(r"(?P<family>\w+)-(?P<variant>[\w-]+)(?P<options>(\+[\w.-]+=[^+]*)*)$")


def split_name(name: str) -> tuple[str, str, list[str]]:
    """Splits a contender's name into family, variant and config options.

    "ours-delayed+model.remat=dots" is ("ours", "delayed", ["--model.remat", "dots"]).

    Raises:
      ValueError: for a name that is no contender, with those that are.
    """
    match = _NAME.match(name)
    if not match or match["variant"] not in VARIANTS.get(match["family"], ()):
        known = ", ".join(f"{family}-{v}" for family in VARIANTS for v in VARIANTS[family])
        raise ValueError(f"contender {name!r} is none of {known}")
    if match["options"] and match["family"] != "ours":
        raise ValueError(f"contender {name!r}: only ours takes +section.key=value options")
    arguments = []
    for option in filter(None, match["options"].split("+")):
        key, value = option.split("=", 1)
        arguments += [f"--{key}", value]
    return match["family"], match["variant"], arguments
