"""The list of a checkpoint's files with their sizes and checksums, by which damage is found.

`manifest.json` is written last and by an atomic rename, so it vouches for a finished folder. It
carries a checksum of itself: a flipped bit anywhere in the folder is found before it is believed.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from train.run_directory import atomic_write

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_MOST_PROBLEMS_SHOWN = 5


class DamageError(ValueError):
    """A folder that does not agree with its manifest, or that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint folder must hold."""

    step: int
    """Optimizer step, which is also the name of the folder."""
    validation_loss: float | None
    """Validation loss [nats per token] of the saved state, if it was measured."""
    files: dict[str, tuple[int, str | None]]
    """Path below the folder -> size [bytes], SHA-256 in hex (None: saved without checksums)."""

    @classmethod
    def of_folder(
        cls, folder: Path, *, step: int, validation_loss: float | None, with_checksums: bool
    ) -> Self:
        """Lists every file of `folder`, and makes sure that each is on the disk.

        Raises:
          OSError: a file cannot be read or flushed.
        """
        paths = _files(folder)
        checksums: Sequence[str | None] = [None] * len(paths)
        if with_checksums:
            checksums = _checksums(paths.values())
        for path in [folder, *folder.rglob("*")]:
            _flush(path)
        files = {}
        for (name, path), checksum in zip(paths.items(), checksums, strict=True):
            files[name] = (path.stat().st_size, checksum)
        return cls(step=step, validation_loss=validation_loss, files=files)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `folder/manifest.json` and checks it against its own checksum.

        Raises:
          DamageError: it is missing, unreadable or altered.
        """
        try:
            content = json.loads((folder / MANIFEST_FILE).read_bytes())
            is_whole = content.pop("sha256") == _digest(content)
        except FileNotFoundError:
            raise DamageError(f"it has no {MANIFEST_FILE}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamageError(f"{MANIFEST_FILE} cannot be read ({error})") from error
        if not is_whole:
            raise DamageError(f"{MANIFEST_FILE} was altered (its checksum differs)")
        if content["format"] != _FORMAT:
            raise DamageError(f"{MANIFEST_FILE} has format {content['format']}, not {_FORMAT}")
        files = {name: (size, checksum) for name, (size, checksum) in content["files"].items()}
        return cls(step=content["step"], validation_loss=content["validation_loss"], files=files)

    def write(self, folder: Path) -> None:
        """Writes `folder/manifest.json` atomically.

        Raises:
          OSError: it cannot be written.
        """
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        content["files"] = {name: list(entry) for name, entry in self.files.items()}
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
        atomic_write(folder / MANIFEST_FILE, text + "\n")

    def verify(self, folder: Path, *, with_checksums: bool) -> None:
        """Checks that `folder` holds exactly these files, whole.

        Args:
          folder: the checkpoint.
          with_checksums: read and compare all contents; otherwise compare names and sizes only.

        Raises:
          DamageError: with up to five of the differences.
        """
        paths = _files(folder)
        # A link could make arrays out of any file of this machine.
        problems = [
            f"{path.relative_to(folder).as_posix()} is a link"
            for path in sorted(folder.rglob("*"))
            if path.is_symlink()
        ]
        problems += [f"{name} is missing" for name in self.files if name not in paths]
        problems += [
            f"{name} does not belong there (delete it to use the checkpoint)"
            for name in paths
            if name not in self.files
        ]
        for name, (size, _) in self.files.items():
            actual = paths[name].stat().st_size if name in paths else size
            if actual != size:
                problems.append(f"{name} has {actual} bytes instead of {size}")
        if with_checksums and not problems:
            problems = self._altered_files(paths)
        if problems:
            more = len(problems) - _MOST_PROBLEMS_SHOWN
            shown = problems[:_MOST_PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
            raise DamageError("; ".join(shown))

    def _altered_files(self, paths: dict[str, Path]) -> list[str]:
        expected = {name: checksum for name, (_, checksum) in self.files.items() if checksum}
        try:
            actual = _checksums(paths[name] for name in expected)
        except OSError as error:  # A bad block of the disk, for one.
            return [f"{error.filename} cannot be read ({error.strerror})"]
        return [
            f"{name} was altered (its checksum differs)"
            for (name, checksum), found in zip(expected.items(), actual, strict=True)
            if found != checksum
        ]


def _files(folder: Path) -> dict[str, Path]:
    """Returns every file below `folder`, save the manifest, by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and path != folder / MANIFEST_FILE
    }


def _checksums(paths: Iterable[Path]) -> list[str]:
    """Returns the SHA-256 of each file; one thread per core.

    `hashlib` releases the GIL: with the SHA instructions of x86 a core takes some 2 GB/s, so 20 GB
    take about a second on 16 cores, if the disk can keep up.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            error.filename = str(path)
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
