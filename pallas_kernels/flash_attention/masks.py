"""Which query may see which key: a band around the diagonal (causal, sliding window), and equal
segment ids.

Positions count from the start of both sequences, as in `jax.nn.dot_product_attention`: with T != S
the causal diagonal starts in the top left corner, and query t sees keys s with `t - left <= s <= t
+ right`.
"""

# Shapes: B batch, T query, S key.

import dataclasses

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """Query t sees the keys s with `t - left <= s <= t + right`; None: no bound on that side."""

    left: int | None = None
    right: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether no pair is masked."""
        return self.left is None and self.right is None

    def has_empty_row(self, query_length: int, key_length: int) -> bool:
        """Whether the window of some query lies past the last key."""
        return self.left is not None and query_length - 1 - self.left > key_length - 1


def make_band(
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
    query_length: int,
    key_length: int,
) -> Band:
    """Folds the causal flag and the window into one band, and drops a bound that masks nothing.

    Args:
      is_causal: no query sees a later key.
      local_window_size: `(left, right)` numbers of neighbours seen on each side, one int for both,
        None for all.
      query_length: T.
      key_length: S.

    Raises:
      ValueError: if a window size is negative or not an int.
    """
    left = right = None
    if local_window_size is not None:
        sizes = (
            local_window_size
            if isinstance(local_window_size, tuple)
            else (local_window_size, local_window_size)
        )
        if len(sizes) != 2 or any(not isinstance(size, int) or size < 0 for size in sizes):
            raise ValueError(
                f"local_window_size={local_window_size!r} must be an int >= 0 or a pair (left,"
                " right) of them; use None to see every key"
            )
        left, right = sizes
    if is_causal:
        right = 0
    return Band(
        left=None if left is None or left >= query_length - 1 else left,
        right=None if right is None or right >= key_length - 1 else right,
    )


def dense_mask(
    band: Band,
    query_positions: Array,
    key_positions: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
) -> Array | None:
    """Returns the mask as an array, True where a query sees a key, or None if it sees them all.

    Args:
      band: the band.
      query_positions: `[T]`, int32.
      key_positions: `[S]`, int32.
      q_segment_ids: `[B, T]`, int32, or None.
      kv_segment_ids: `[B, S]`, int32, or None.

    Returns:
      `[1 or B, T, S]`, bool, or None.
    """
    offset = key_positions[None, None, :] - query_positions[None, :, None]
    parts = []
    if band.left is not None:
        parts.append(offset >= -band.left)
    if band.right is not None:
        parts.append(offset <= band.right)
    if q_segment_ids is not None and kv_segment_ids is not None:
        parts.append(q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
    if not parts:
        return None
    mask = parts[0]
    for part in parts[1:]:
        mask = jnp.logical_and(mask, part)
    return mask
