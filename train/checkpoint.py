"""Checkpoints: asynchronous, atomic, checksummed, restored from the newest good one.

    checkpoints/200/              a whole checkpoint; the name is the optimizer step
      state/                      the arrays, written by orbax (OCDBT, not compressed)
      data_state.json             position of the data pipeline
      meta.json                   shape and dtype of every array; what the caller adds
      manifest.json               size and SHA-256 of every file above; written last
    checkpoints/300.incomplete/   being written, or left by a kill; never read
    checkpoints/100.deleted/      being deleted, or left by a kill; never read

A folder gets its plain name by a rename, after its manifest is on the disk. So a plain name means
whole, and a plain folder that disagrees with its manifest was damaged later. Older checkpoints are
deleted only after that rename; leftovers go at the next save.
"""

import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.checkpoint_content import (
    DATA_STATE_FILE,
    CheckpointError,
    encode_data_state,
    named_leaves,
    own_data_state,
    require_plain_array,
    require_same_leaves,
    require_same_meta,
    signature,
)
from train.config import CheckpointConfig
from train.manifest import DamageError, Manifest
from train.run_directory import sync_folder

PyTree = Any

_STATE_FOLDER = "state"
_META_FILE = "meta.json"
_INCOMPLETE = ".incomplete"
_DELETED = ".deleted"
# Arrays are cut, and files closed, at these sizes [bytes], so that many threads share the hashing
# and reading even of one huge stacked weight.
_CHUNK_BYTES = 256 << 20
_FILE_BYTES = 1 << 30


class CheckpointSaveError(RuntimeError):
    """Checkpoints that could not be saved. Earlier ones are whole, and training can go on."""

    def __init__(self, failures: Mapping[int, BaseException]):
        self.failures = dict(failures)
        """Step -> what went wrong."""
        reasons = ", ".join(
            f"checkpoint {step} was not saved ({_reason(error)})"
            for step, error in failures.items()
        )
        super().__init__(f"{reasons}; earlier ones are whole, and training can go on")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What `Checkpointer.restore_newest` found."""

    step: int
    """Optimizer steps done."""
    state: PyTree
    """The arrays, in the tree, dtypes and shardings that were asked for."""
    data_state: bytes | dict
    """What this process gave as `data_state`."""
    meta: dict
    """What was given as `meta`."""


class Checkpointer:
    """Saves and restores one run's state. A context manager: leaving it waits for the last save.

    With several processes each calls every method, at the same step; the folder is shared, and
    process 0 writes the manifest, renames and deletes.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        report: Callable[[str], None] = print,
    ):
        """Touches neither disk nor device.

        Args:
          directory: folder of the checkpoints; made by the first save.
          config: how many are kept, and whether they carry checksums.
          report: gets one line for each damaged checkpoint that a restore passes over.
        """
        self._directory = Path(directory).absolute()
        self._config = config
        self._report = report
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        )
        self._thread: threading.Thread | None = None
        self._failures: dict[int, BaseException] = {}
        self._damaged: set[int] = set()
        self._saved: set[int] = set()
        _ORBAX_LOG_FILTER.install()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, oldest first; damaged ones included."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

    # Saving.

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data_state: bytes | dict,
        meta: Mapping[str, Any] | None = None,
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving; returns when the arrays are in host memory and may be donated.

        Waits first for an earlier save that still runs. A step that this object has saved or
        restored is not saved again. The newest `config.keep` checkpoints are kept, and the one with
        the lowest `validation_loss` besides.

        Args:
          step: optimizer steps done, at least 0.
          state: any pytree of `jax.Array`, of any sharding, fully addressable or not.
          data_state: position of this process in the data; bytes or a JSON object.
          meta: a JSON object to be kept with it.
          validation_loss: of this state [nats per token]; None if not measured.

        Raises:
          CheckpointSaveError: an *earlier* save failed since this was last asked, or this one could
            not start. Only in the second case is `step` among its `failures`.
          TypeError: a leaf is not a `jax.Array` of numbers, or `data_state` or `meta` not JSON.
        """
        leaves = named_leaves(state)
        for name, leaf in leaves.items():
            require_plain_array(name, leaf)
        description = {
            "leaves": {name: signature(leaf) for name, leaf in leaves.items()},
            "process_count": jax.process_count(),
            "meta": dict(meta or {}),
        }
        files = {
            DATA_STATE_FILE: encode_data_state(data_state),
            _META_FILE: json.dumps(description, indent=1),
        }
        self._join()
        if _broadcast(step not in self._saved):
            try:
                self._start(step, leaves, files, validation_loss)
            except Exception as error:  # Whatever stopped it, the caller learns of it below.
                self._abandon(step, error)
        self._raise_failures()

    def wait(self) -> None:
        """Returns when no save is running.

        Raises:
          CheckpointSaveError: a save failed since this was last asked.
        """
        self._join()
        self._raise_failures()

    def close(self) -> None:
        """Waits, and frees the threads. A failure that nobody has asked for yet is reported."""
        self._join()
        self._orbax.close()
        try:
            self._raise_failures()
        except CheckpointSaveError as error:  # Raised here it would hide why the run is ending.
            self._report(str(error))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failures(self) -> None:
        failures, self._failures = self._failures, {}
        if failures:
            raise CheckpointSaveError(failures) from next(iter(failures.values()))

    def _start(
        self, step: int, leaves: dict, files: dict[str, str], validation_loss: float | None
    ) -> None:
        folder = self._incomplete(step)
        is_ready, problem = True, None
        if jax.process_index() == 0:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                _require_space(self._directory, sum(leaf.nbytes for leaf in leaves.values()))
                folder.mkdir()
            except OSError as error:
                is_ready, problem = False, error
        # Otherwise the other processes would wait in orbax for one that has given up.
        if not _broadcast(is_ready):
            raise problem or OSError("process 0 could not make the folder")
        # orbax refuses empty arrays; `meta.json` knows all there is to know about them.
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        arguments = ocp.args.PyTreeSave(
            arrays,
            save_args={name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays},
            ocdbt_target_data_file_size=_FILE_BYTES,
        )
        self._orbax.save(folder / _STATE_FOLDER, args=arguments)
        self._thread = threading.Thread(
            target=self._finish, args=(step, files, validation_loss), name="checkpoint"
        )
        self._thread.start()

    def _finish(self, step: int, files: dict[str, str], validation_loss: float | None) -> None:
        """Completes a save, in the background. `_join` orders its writes before the next reads."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._commit(step, files, validation_loss)
            self._saved.add(step)
            self._damaged.discard(step)
        except Exception as error:  # `save` or `wait` raises it in the caller's thread.
            self._abandon(step, error)
            return
        if jax.process_index() == 0:
            try:
                self._delete_old(step)
            except OSError as error:
                self._report(f"checkpoint {step} is saved; an older one cannot be deleted: {error}")

    def _commit(self, step: int, files: dict[str, str], validation_loss: float | None) -> None:
        incomplete, folder = self._incomplete(step), self._directory / str(step)
        for name, text in files.items():
            (incomplete / name).write_text(text + "\n")
        is_measured = validation_loss is not None and math.isfinite(validation_loss)
        Manifest.of_folder(
            incomplete,
            step=step,
            validation_loss=float(validation_loss) if is_measured else None,
            with_checksums=self._config.verify,
        ).write(incomplete)
        if folder.exists():  # Damaged: a good one would have been resumed from.
            folder.rename(folder.with_name(folder.name + _DELETED))
        incomplete.rename(folder)
        sync_folder(self._directory)

    def _abandon(self, step: int, error: Exception) -> None:
        self._failures[step] = error
        if jax.process_index() == 0:
            _remove(self._incomplete(step))

    def _delete_old(self, newest: int) -> None:
        losses: dict[int, float | None] = {}
        for step in self.steps():
            if step not in self._damaged:
                try:
                    losses[step] = Manifest.read(self._directory / str(step)).validation_loss
                except DamageError:
                    continue  # Not ours, or damaged since: nobody was told of it yet.
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        kept = {newest, *list(losses)[-self._config.keep :]}
        if measured:
            kept.add(min(measured, key=measured.__getitem__))
        for step in {*losses, *self._damaged} - kept:
            folder = self._directory / str(step)
            if folder.exists():
                # A kill half-way through the deletion must not leave a damaged checkpoint.
                folder.rename(folder.with_name(folder.name + _DELETED))
        self._damaged.clear()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for path in self._directory.iterdir():
            if path.stem.isdecimal() and path.suffix in (_INCOMPLETE, _DELETED):
                _remove(path)

    def _incomplete(self, step: int) -> Path:
        return self._directory / f"{step}{_INCOMPLETE}"

    # Restoring.

    def restore_newest(
        self,
        abstract_state: PyTree,
        must_match: Mapping[str, Any] | None = None,
        *,
        is_partial: bool = False,
    ) -> Restored | None:
        """Restores the newest checkpoint that is whole.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` or `jax.Array`; its leaves give shapes,
            dtypes and shardings (none: the first device). The mesh need not be the one of the save.
          must_match: what its `meta` must hold for its weights to mean anything here, such as the
            hash of the tokenizer; a value of None is not compared.
          is_partial: `abstract_state` is a part of the saved tree, such as the weights alone; the
            rest is not read.

        Returns: what was found, bitwise equal to what was saved; None if there is no checkpoint.

        Raises:
          CheckpointError: there are checkpoints but all are damaged; or the newest good one has
            another tree, shape or dtype, or `meta` that does not match.
        """
        self._join()
        step = self._newest_good()
        if step is None:
            return None
        folder = self._directory / str(step)
        description = json.loads((folder / _META_FILE).read_text())
        require_same_meta(step, description["meta"], must_match or {})
        leaves = named_leaves(abstract_state)
        require_same_leaves(step, description["leaves"], leaves, is_partial)
        arrays = self._restore_arrays(folder / _STATE_FOLDER, leaves)
        self._saved.add(step)
        return Restored(
            step=step,
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), arrays.values()),
            data_state=own_data_state(step, folder, description["process_count"]),
            meta=description["meta"],
        )

    def _newest_good(self) -> int | None:
        """Returns the newest step whose folder agrees with its manifest; process 0 looks."""
        reasons: dict[int, str] = {}
        found = -1
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                folder = self._directory / str(step)
                try:
                    manifest = Manifest.read(folder)
                    if manifest.step != step:
                        raise DamageError(f"its manifest is of checkpoint {manifest.step}")
                    manifest.verify(folder, with_checksums=self._config.verify)
                    found = step
                    break
                except DamageError as error:
                    reasons[step] = str(error)
                    self._report(f"checkpoint {step} is damaged and not used: {error}")
            self._damaged |= set(reasons)
        found, damaged = _broadcast(found), _broadcast(len(reasons))
        if found < 0 and damaged:
            raise CheckpointError(
                f"{self._directory} holds {damaged} checkpoints, and none is good:\n"
                + "\n".join(f"  {step}: {reason}" for step, reason in reasons.items())
                + "\nput a good copy back, or start anew with another --run.directory"
            )
        return found if found >= 0 else None

    def _restore_arrays(self, folder: Path, leaves: dict) -> dict[str, jax.Array]:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = {
            name: getattr(leaf, "sharding", None) or first for name, leaf in leaves.items()
        }
        wanted = {name: leaf for name, leaf in leaves.items() if math.prod(leaf.shape)}
        arguments = ocp.args.PyTreeRestore(
            item={name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in wanted.items()},
            restore_args={
                name: ocp.ArrayRestoreArgs(
                    sharding=shardings[name], global_shape=leaf.shape, dtype=leaf.dtype
                )
                for name, leaf in wanted.items()
            },
            partial_restore=True,  # The leaves were compared already, by name, shape and dtype.
        )
        try:
            arrays = self._orbax.restore(folder, args=arguments) if wanted else {}
        except Exception as error:  # Damage that only --checkpoint.verify finds, or no memory left.
            raise CheckpointError(f"{folder} cannot be restored: {_reason(error)}") from error
        return {
            name: arrays[name]
            if name in arrays
            else jnp.zeros(leaf.shape, leaf.dtype, device=shardings[name])
            for name, leaf in leaves.items()
        }


def _broadcast(value: int) -> int:
    """Returns process 0's value on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _require_space(folder: Path, needed: int) -> None:
    """Raises OSError if `needed` bytes cannot fit, before a write that would fail half-way."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no space left on device: it takes {needed / 2**30:.3g} GiB, and {free / 2**30:.3g}"
            " GiB are free",
        )


def _remove(path: Path) -> None:
    # After a failed save some writes of orbax may still be under way and put files back.
    for _ in range(3):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return


def _reason(error: BaseException) -> str:
    """Returns one line; tensorstore reports a full disk in a paragraph that holds the errno."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif found := re.search(r"os_error_code='(\d+)'", str(error)):
        text = os.strerror(int(found[1]))
    else:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text[0].lower() + text[1:]


class _OrbaxLogFilter(logging.Filter):
    """Drops the tracebacks that orbax logs of a failed save; CheckpointSaveError reports it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.levelno == logging.ERROR and "orbax" in record.pathname)

    def install(self) -> None:
        logging.getLogger("absl").addFilter(self)


_ORBAX_LOG_FILTER = _OrbaxLogFilter()
