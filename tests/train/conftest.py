"""One small run from beginning to end, that several tests look at."""

import dataclasses
from pathlib import Path

import pytest
from run_cases import finish, make_arguments, start, write_text


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that nobody disturbed, and how to start others like it."""

    directory: Path
    text: Path
    xla_cache: Path
    exit_code: int
    stdout: str
    stderr: str

    def arguments(self, directory: Path | None = None, **options: object) -> list[str]:
        """The same command for another directory or with other options."""
        return make_arguments(directory or self.directory, self.text, **options)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files."""
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="session")
def xla_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are shared."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, text: Path, xla_cache: Path
) -> FinishedRun:
    """`python -m train.main`, undisturbed."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    result = finish(start(make_arguments(directory, text), xla_cache))
    return FinishedRun(directory, text, xla_cache, *result)
