"""The model against float64 NumPy; its loops and remat policies against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jfp8
import jfp8.nnx
from train.config import ModelConfig
from train.loss import cross_entropy
from train.model import Transformer, rotary_angles, rotate

CONFIG = ModelConfig(
    hidden_size=32, num_layers=2, ffn_size=64, num_heads=4, num_kv_heads=2, vocab_size=48
)
BF16, CURRENT = jfp8.Recipe(name="bf16"), jfp8.Recipe(name="current")
B, T = 2, 16


def make(config=CONFIG, recipe=BF16, seed=0):
    return Transformer(config, recipe, rngs=nnx.Rngs(seed))


def inputs(documents=False):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32)
    positions, segments = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)
    if documents:
        positions[:, 6:] -= 6
        segments[:, 6:] = 2
    return tokens, positions, segments


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None] * CONFIG.rope_theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([z.real, z.imag], -1)


def reference(params, tokens, positions, segments):
    """Final hidden states [T, D] of one sequence in float64; params of a scanned model."""
    config = CONFIG
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.resolved_head_dim
    group, pair = heads // kv_heads, 64
    x = config.embedding_multiplier * params["embedding"][tokens]
    for i in range(config.num_layers):
        block = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        y = norm(x, block["attention_norm"]["weight"], config.norm_eps)
        qkv = y @ block["attention"]["qkv"]["kernel"]
        qkv = qkv.reshape(T, kv_heads, group + 2, head_dim)
        attended = np.zeros((T, heads, head_dim))
        for head in range(heads):
            kv = head // group
            q = rope(qkv[:, kv, head % group][:, None], positions)[:, 0]
            k = rope(qkv[:, kv, group][:, None], positions)[:, 0]
            scores = q @ k.T / np.sqrt(head_dim)
            allowed = np.tril(np.ones((T, T), bool)) & (segments[:, None] == segments)
            scores = np.where(allowed, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            attended[:, head] = weights / weights.sum(-1, keepdims=True) @ qkv[:, kv, group + 1]
        x = x + attended.reshape(T, -1) @ block["attention"]["out"]["kernel"]
        y = norm(x, block["ffn_norm"]["weight"], config.norm_eps)
        gate_up = (y @ block["ffn"]["gate_up"]["kernel"]).reshape(T, -1, 2, pair)
        gate, up = gate_up[:, :, 0].reshape(T, -1), gate_up[:, :, 1].reshape(T, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["ffn"]["down"]["kernel"]
    return norm(x, params["final_norm"]["weight"], config.norm_eps)


def relative_error(got, expected):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("documents", [False, True])
def test_forward_matches_float64(documents):
    model = make()
    # Larger weights than the initial ones, so that every part moves the result.
    params = jax.tree.map(lambda p: p * 2, nnx.split(model, nnx.Param)[1])
    nnx.update(model, params)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(params))
    tokens, positions, segments = inputs(documents)
    got = model(tokens, positions, segments)
    expected = [reference(params, *row) for row in zip(tokens, positions, segments, strict=True)]
    # 2^-8 is one rounding to bfloat16; two blocks make about ten in a row.
    assert relative_error(got, np.stack(expected)) < 10 * 2**-8


def test_documents_do_not_see_each_other():
    model, (tokens, positions, segments) = make(), inputs(documents=True)
    changed = tokens.copy()
    changed[:, :6] = (changed[:, :6] + 1) % CONFIG.vocab_size
    before, after = (model(t, positions, segments) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, 6:], after[:, 6:])
    assert not np.array_equal(before[:, :6], after[:, :6])


@functools.cache
def loss_and_gradients(config, recipe=BF16):
    graph, params, scaling = nnx.split(make(config, recipe), nnx.Param, jfp8.nnx.Scaling)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.square(nnx.merge(graph, params, scaling)(*inputs()).astype(jnp.float32)).sum()

    value, grads = loss(params)
    return value, nnx.to_pure_dict(grads)


@pytest.mark.parametrize("recipe", [BF16, CURRENT], ids=["bf16", "current"])
@pytest.mark.parametrize("remat", ["dots", "attention", "block"])
def test_remat_changes_no_bit(remat, recipe):
    expected = loss_and_gradients(CONFIG, recipe)
    got = loss_and_gradients(dataclasses.replace(CONFIG, remat=remat), recipe)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_unrolled_blocks_are_the_scanned_ones():
    scanned, unrolled = make(), make(dataclasses.replace(CONFIG, layer_loop="unroll"))
    for i, block in enumerate(unrolled.blocks):
        stacked = nnx.split(scanned.blocks)[1]
        nnx.update(block, jax.tree.map(lambda p, i=i: p[i], stacked))
    unrolled.embedding[...] = scanned.embedding[...]
    expected = np.asarray(scanned(*inputs()), np.float64)
    assert relative_error(unrolled(*inputs()), expected) < 2**-8


def test_tied_head_is_the_transposed_embedding():
    model = make(dataclasses.replace(CONFIG, tie_embeddings=True))
    np.testing.assert_array_equal(model.head_kernel(), np.asarray(model.embedding[...]).T)
    assert not hasattr(model, "head")


def test_qk_norm_has_weights_and_bounds_the_scores():
    model = make(dataclasses.replace(CONFIG, qk_norm=True))
    attention = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])["blocks"]["attention"]
    assert attention["q_norm"]["weight"].shape == (CONFIG.num_layers, CONFIG.resolved_head_dim)
    assert np.isfinite(np.float32(model(*inputs()))).all()


def test_window_hides_what_is_further_back():
    config = dataclasses.replace(CONFIG, local_window_size=2, num_layers=1)
    model, (tokens, positions, _) = make(config), inputs()
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % CONFIG.vocab_size
    before, after = (np.float32(model(t, positions, None)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
    assert (before[:, :3] != after[:, :3]).any(axis=(0, 2)).all()


def test_rotation_keeps_lengths_and_relative_positions():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8))

    def at(x, p):
        return np.asarray(rotate(jnp.float32(x), *rotary_angles(jnp.array([[p]]), 8, 1e4)))

    np.testing.assert_allclose(np.linalg.norm(at(q, 77)), np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum(), 1e-4)


def test_skipped_layer_has_no_scaling_state():
    recipe = jfp8.Recipe(name="delayed", skip=("*.down",))
    scaling = nnx.to_pure_dict(nnx.split(make(recipe=recipe), nnx.Param, ...)[2])
    assert "down" not in scaling["blocks"]["ffn"]
    assert "gate_up" in scaling["blocks"]["ffn"]


def test_initial_weights():
    """Embeddings 1 / 50, kernels and head sqrt(2 / 5D), `out` and `down` over sqrt(2 layers)."""
    config = ModelConfig(
        hidden_size=160, num_layers=8, ffn_size=320, num_heads=4, num_kv_heads=2, vocab_size=512
    )
    params = nnx.to_pure_dict(nnx.split(make(config), nnx.Param)[1])
    blocks = params["blocks"]
    kernels = {name: params[name] for name in ("embedding", "head")}
    kernels |= {name: blocks["attention"][name]["kernel"] for name in ("qkv", "out")}
    kernels |= {name: blocks["ffn"][name]["kernel"] for name in ("gate_up", "down")}
    assert {name: float(kernel.std()) for name, kernel in kernels.items()} == {
        "embedding": pytest.approx(0.02, rel=0.02),
        **{name: pytest.approx(0.05, rel=0.02) for name in ("head", "qkv", "gate_up")},
        **{name: pytest.approx(0.0125, rel=0.02) for name in ("out", "down")},
    }


@pytest.mark.parametrize("multiplier", [1.0, 4.0])
def test_embeddings_times_a_multiplier_begin_with_variance_one(multiplier):
    model = make(dataclasses.replace(CONFIG, embedding_multiplier=multiplier))
    assert float(model.embedding[...].std()) == pytest.approx(1 / multiplier, rel=0.05)
    seen = []
    model._apply_blocks = lambda x, *_: seen.append(x) or x
    model(jnp.arange(16)[None], jnp.arange(16)[None], None)
    want = multiplier * np.asarray(model.embedding[:16], np.float32)
    np.testing.assert_allclose(np.float32(seen[0]), want, rtol=2**-8)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_first_loss_and_gradient(tied):
    """The loss begins near ln V, and no gradient is amplified on its way to the embedding."""
    config = ModelConfig(
        hidden_size=256, num_layers=4, ffn_size=512, num_heads=4, num_kv_heads=4, vocab_size=1024,
        tie_embeddings=tied,
    )  # fmt: skip
    graph, params, scaling = nnx.split(make(config), nnx.Param, jfp8.nnx.Scaling)
    tokens = np.random.default_rng(0).integers(0, 1024, (8, 65)).astype(np.int32)
    positions = np.tile(np.arange(64, dtype=np.int32), (8, 1))
    weights = np.full((8, 64), 1 / 512, np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        model = nnx.merge(graph, params, scaling)
        hidden = model(tokens[:, :-1], positions, None)
        return cross_entropy(hidden, model.head_kernel(), tokens[:, 1:], weights)[0]

    value, grads = loss(params)
    norm = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.linalg.norm(grad))
        for path, grad in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(grads))
    }
    # Logits of variance 2 / 5 add half of it.
    assert value == pytest.approx(np.log(1024) + 0.2 * (not tied), abs=0.1)
    assert float(np.sqrt(sum(x * x for x in norm.values()))) < 3, norm
    if not tied:
        # With respect to what the blocks read, the multiplier left out.
        assert norm["embedding"] / config.embedding_multiplier < norm["head"]
