"""Named attention problems that every implementation's tests share, and their inputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels import oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of flash_attention."""

    name: str
    b: int = 2
    t: int = 24
    s: int = 24
    n: int = 4
    k: int = 2
    h: int = 16
    is_causal: bool = False
    window: tuple[int, int] | None = None
    segments: str = ""  # "packed": documents one after another; "padded": some queries see no key
    softmax_scale: float | None = None

    def __str__(self):
        return self.name

    def options(self):
        """Returns the keyword arguments of flash_attention."""
        q_ids, kv_ids = self.segment_ids()
        return dict(
            is_causal=self.is_causal,
            local_window_size=self.window,
            softmax_scale=self.softmax_scale,
            q_segment_ids=None if q_ids is None else jnp.asarray(q_ids),
            kv_segment_ids=None if kv_ids is None else jnp.asarray(kv_ids),
        )

    def segment_ids(self):
        """Returns int32 [B, T] and [B, S], or a pair of None."""
        if not self.segments:
            return None, None
        rows = []
        for b in range(self.b):
            cuts = np.random.default_rng(7 + b).integers(1, self.s, size=3)
            rows.append(np.searchsorted(np.sort(cuts), np.arange(max(self.t, self.s)), "right"))
        ids = np.stack(rows).astype(np.int32)
        q_ids, kv_ids = ids[:, : self.t].copy(), ids[:, : self.s].copy()
        if self.segments == "padded":
            q_ids[:, -self.t // 4 :] = 1000  # no key has this id
            kv_ids[:, : self.s // 6] = -1  # no query has this one
        return q_ids, kv_ids

    def arrays(self, dtype, seed=0):
        """Returns q, k, v, dout in dtype and dlse in float32."""
        rng = np.random.default_rng(seed)
        shapes = [(self.t, self.n), (self.s, self.k), (self.s, self.k), (self.t, self.n)]
        q, k, v, dout = (
            jnp.asarray(rng.standard_normal((self.b, length, heads, self.h)), dtype)
            for length, heads in shapes
        )
        dlse = jnp.asarray(rng.standard_normal((self.b, self.t, self.n)), jnp.float32)
        return q, k, v, dout, dlse

    def expected(self, q, k, v, dout=None, dlse=None):
        """Returns the oracle's result for these arrays."""
        q_ids, kv_ids = self.segment_ids()
        arrays = [None if x is None else np.asarray(x, np.float64) for x in (q, k, v, dout, dlse)]
        return oracle.attention(
            *arrays,
            is_causal=self.is_causal,
            window=self.window,
            q_ids=q_ids,
            kv_ids=kv_ids,
            softmax_scale=self.softmax_scale,
        )


CASES = (
    Case(name="full_mha", n=2, k=2),
    Case(name="causal_gqa", is_causal=True),
    Case(name="causal_mqa_odd_length", t=23, s=23, n=3, k=1, is_causal=True),
    Case(name="causal_more_keys", t=9, s=24, is_causal=True),
    Case(name="causal_more_queries", t=24, s=9, is_causal=True),
    Case(name="cross_more_keys", t=7, s=24),
    Case(name="window_both_sides", window=(5, 3)),
    Case(name="window_causal", window=(6, 2), is_causal=True),
    Case(name="window_left_of_all_keys", t=24, s=9, window=(4, 0)),
    Case(name="packed_causal", segments="packed", is_causal=True),
    Case(name="packed_window", segments="packed", window=(4, 4)),
    Case(name="padded_rows", segments="padded", is_causal=True),
    Case(name="one_token", t=1, s=1, is_causal=True),
    Case(name="large_scale", softmax_scale=3.0, is_causal=True),
)
