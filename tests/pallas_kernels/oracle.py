"""Attention and its gradients in NumPy float64, straight from the definition.

It loops over batch and heads and shares no code with the package.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """Float64 results; gradients belong to the given dout and dlse."""

    out: np.ndarray  # [B, T, N, H]
    lse: np.ndarray  # [B, T, N]
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def visible(t, s, is_causal, window, q_ids, kv_ids):
    """Returns bool [T, S]: which query sees which key, pair by pair."""
    mask = np.ones((t, s), bool)
    for i in range(t):
        for j in range(s):
            if is_causal and j > i:
                mask[i, j] = False
            if window is not None and not (i - window[0] <= j <= i + window[1]):
                mask[i, j] = False
            if q_ids is not None and q_ids[i] != kv_ids[j]:
                mask[i, j] = False
    return mask


def attention(
    q,
    k,
    v,
    dout=None,
    dlse=None,
    *,
    is_causal=False,
    window=None,
    q_ids=None,
    kv_ids=None,
    softmax_scale=None,
):
    """Returns the Result for q [B, T, N, H] and k, v [B, S, K, H]; window is (left, right)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, t, n, h = q.shape
    s, num_kv_heads = k.shape[1:3]
    scale = softmax_scale if softmax_scale is not None else h**-0.5
    dout = np.zeros_like(q) if dout is None else np.asarray(dout, np.float64)
    dlse = np.zeros((batch, t, n)) if dlse is None else np.asarray(dlse, np.float64)
    out, lse = np.zeros_like(q), np.zeros((batch, t, n))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        ids = (None, None) if q_ids is None else (q_ids[b], kv_ids[b])
        mask = visible(t, s, is_causal, window, *ids)
        some = mask.any(axis=1)
        for i in range(n):
            j = i // (n // num_kv_heads)
            logits = np.where(mask, scale * q[b, :, i] @ k[b, :, j].T, -np.inf)
            peak = np.where(some, logits.max(axis=1), 0.0)
            weights = np.exp(logits - peak[:, None])
            total = np.where(some, weights.sum(axis=1), 1.0)
            p = weights / total[:, None]
            out[b, :, i] = p @ v[b, :, j]
            lse[b, :, i] = np.where(some, peak + np.log(total), -np.inf)
            dp = dout[b, :, i] @ v[b, :, j].T
            delta = (p * dp).sum(axis=1)
            ds = p * (dp - delta[:, None] + np.where(some, dlse[b, :, i], 0.0)[:, None])
            dq[b, :, i] = scale * ds @ k[b, :, j]
            dk[b, :, j] += scale * ds.T @ q[b, :, i]
            dv[b, :, j] += p.T @ dout[b, :, i]
    return Result(out, lse, dq, dk, dv)
