"""What a checkpoint holds besides raw arrays: names, shapes, data positions, the caller's notes."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any
DATA_STATE_FILE = "data_state.json"
_MOST_LEAVES_SHOWN = 10


class CheckpointError(RuntimeError):
    """There are checkpoints, and none can be gone on from; the message lists why."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns {"params.blocks.kernel": leaf} in the order of `jax.tree.leaves`.

    Names, rather than the tree itself, are saved: a checkpoint then does not depend on the Python
    classes of optax or Flax.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if name in leaves:
            raise TypeError(f"two leaves of the state are both called {name!r}; rename a key")
        leaves[name] = leaf
    return leaves


def require_plain_array(name: str, leaf: object) -> None:
    """Raises TypeError if a leaf of the state cannot be saved as it is."""
    if not isinstance(leaf, jax.Array):
        raise TypeError(f"state leaf {name!r} is a {type(leaf).__name__}, not a jax.Array")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"state leaf {name!r} is a typed PRNG key; save jax.random.key_data of it")


def signature(leaf: Any) -> list:
    """Returns [name of the dtype, [sizes]] of an array or `jax.ShapeDtypeStruct`."""
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def require_same_leaves(step: int, saved: dict, leaves: dict, is_partial: bool) -> None:
    """Raises CheckpointError listing up to ten leaves that differ from the saved signatures.

    Args:
      step: of the checkpoint.
      saved: name -> signature in the checkpoint.
      leaves: name -> array or `jax.ShapeDtypeStruct` of this run.
      is_partial: leaves that only the checkpoint has are no difference.
    """
    wanted = {name: signature(leaf) for name, leaf in leaves.items()}
    names = wanted if is_partial else {**saved, **wanted}
    differences = [
        f"  {name}: checkpoint {_show(saved.get(name))}, this run {_show(wanted.get(name))}"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        more = len(differences) - _MOST_LEAVES_SHOWN
        raise CheckpointError(
            f"checkpoint {step} is of another architecture; {len(differences)} of {len(names)}"
            " arrays differ:\n"
            + "\n".join(differences[:_MOST_LEAVES_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
            + "\ngive the model and optimizer it was trained with, or another --run.directory"
        )


def _show(signature: list | None) -> str:
    return f"{signature[0]}{signature[1]}" if signature else "none"


def require_same_meta(step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError listing the entries of `wanted`, save None, that `saved` lacks."""
    differences = [
        f"  {name}: checkpoint {saved.get(name)!r}, this run {value!r}"
        for name, value in wanted.items()
        if value is not None and saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {step} was trained with something else:\n"
            + "\n".join(differences)
            + "\nits weights mean nothing with these; give what it was trained with, or another"
            " --run.directory"
        )


def encode_data_state(data_state: bytes | dict) -> str:
    """Returns the JSON text that holds the data state of every process, or one if all are equal."""
    if isinstance(data_state, bytes):
        return json.dumps(_gather({"base64": base64.b64encode(data_state).decode()}))
    return json.dumps(_gather({"json": data_state}))


def own_data_state(step: int, folder: Path, process_count: int) -> bytes | dict:
    """Returns what this process gave to `encode_data_state`, of which `process_count` took part.

    Raises:
      CheckpointError: the processes had different data states and their number has changed.
    """
    entries = json.loads((folder / DATA_STATE_FILE).read_text())
    if len(entries) > 1 and process_count != jax.process_count():
        raise CheckpointError(
            f"checkpoint {step} holds the data positions of {process_count} processes, and this run"
            f" has {jax.process_count()}; start as many processes as before"
        )
    entry = entries[jax.process_index() if len(entries) > 1 else 0]
    return base64.b64decode(entry["base64"]) if "base64" in entry else entry["json"]


def _gather(entry: dict) -> list[dict]:
    """Returns the entries of all processes, or a single one if all are equal."""
    if jax.process_count() == 1:
        return [entry]
    text = np.frombuffer(json.dumps(entry).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    entries = [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
    return entries[:1] if all(other == entries[0] for other in entries) else entries
