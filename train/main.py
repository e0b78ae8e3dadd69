"""Entry point: `python -m train.main [--config FILE.toml] [--section.key value ...]`."""

import sys

from train.config import ConfigError, parse
from train.environment import prepare_environment
from train.interrupt import Interrupt


def main(arguments: list[str] | None = None) -> int:
    """Trains as the arguments say.

    Args:
      arguments: what follows the program name; None takes them from the command line.

    Returns: 0 when the run is complete; 128 + the signal's number when SIGINT or SIGTERM stopped
      it; 2 for bad input; 3 when training itself failed.
    """
    with Interrupt() as interrupt:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        prepare_environment()
        # Imported late: bad arguments are reported in a fraction of a second, and the flags must be
        # set before JAX is.
        from train.checkpoint_content import CheckpointError
        from train.data import DataError
        from train.loop import TrainingError, train

        try:
            return train(config, interrupt)
        except (ConfigError, DataError, CheckpointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 3


if __name__ == "__main__":
    sys.exit(main())
