"""One contender's process: `python -m benchmarks.contenders TASK.json RESULT.json`.

The task: "name", "config_arguments" (of `train.config.parse`, for ours), "model" (the fields of
`ModelConfig`), "batch_size", "sequence_length", "warmup", "steps", "compile" (torch.compile).
"""

import importlib
import json
import sys
from pathlib import Path

from benchmarks.common import write_json
from benchmarks.contenders import MODULES, split_name

MISSING_EXIT_CODE = 3


def main(task_path: str, result_path: str) -> int:
    """Runs the task; 0 when measured, 3 when a package is missing (the result then says which)."""
    task = json.loads(Path(task_path).read_text())
    family, task["variant"], _ = split_name(task["name"])
    if family == "ours":
        from train.environment import prepare_environment

        prepare_environment()
    try:
        result = importlib.import_module(MODULES[family]).run(task)
    except ModuleNotFoundError as error:
        write_json(Path(result_path), {"missing": str(error)})
        return MISSING_EXIT_CODE
    write_json(Path(result_path), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
