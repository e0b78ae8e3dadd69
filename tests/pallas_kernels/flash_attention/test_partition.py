"""Sharded and mapped calls: the partitioner's rule on eight CPU devices, the kernels' lowering."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import flash_attention, hardware
from pallas_kernels.flash_attention import partition
from pallas_kernels.reference import attention_reference
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.flash_attention.test_sm90_forward import spec_of

LAYOUTS = ("btnh", "bskh", "bskh")
RESULTS = ("btnh", "btn")


def local_attention(q, k, v, spec):
    """Attention that insists on a spec that fits its arrays, as the kernels do."""
    assert q.shape == (spec.batch_size, spec.query_length, spec.num_heads, spec.head_dim)
    assert k.shape == (spec.batch_size, spec.key_length, spec.num_kv_heads, spec.head_dim)
    return attention_reference(q, k, v, softmax_scale=spec.softmax_scale, band=spec.band)


def attend(case, q, k, v):
    return partition.call(local_attention, LAYOUTS, RESULTS, (q, k, v), spec_of(case))


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


CASES = [
    (Case(name="mha", b=4, n=4, k=4, is_causal=True), (4, 2)),
    (Case(name="gqa", b=2, n=8, k=4, is_causal=True), (2, 4)),
    (Case(name="batch_alone", b=8, n=3, k=1, is_causal=True), (8, 1)),
]


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[str(c) for c, _ in CASES])
def test_batch_and_heads_stay_where_they_are(case, shape):
    sharding = NamedSharding(mesh_of(*shape), PartitionSpec("data", None, "tensor"))
    q, k, v, *_ = case.arrays(jnp.float32)
    expected = case.expected(q, k, v)
    run = jax.jit(functools.partial(attend, case))
    arrays = [jax.device_put(x, sharding) for x in (q, k, v)]
    compiled = run.lower(*arrays).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    out, lse = compiled(*arrays)
    assert out.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(out, expected.out, atol=2e-5)
    np.testing.assert_allclose(lse, expected.lse, atol=2e-5)


def test_heads_that_do_not_divide_are_gathered():
    case = Case(name="mqa", b=2, n=8, k=1, is_causal=True)
    mesh = mesh_of(2, 4)
    q, k, v, *_ = case.arrays(jnp.float32)
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    arrays = [jax.device_put(q, heads), jax.device_put(k, batch), jax.device_put(v, batch)]
    out, _ = jax.jit(functools.partial(attend, case))(*arrays)
    np.testing.assert_allclose(out, case.expected(q, k, v).out, atol=2e-5)


def test_vmap_folds_its_axis_into_the_batch():
    case = Case(name="causal", b=6, is_causal=True)
    q, k, v, *_ = case.arrays(jnp.float32)
    one = dataclasses.replace(case, b=2)
    mapped = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]
    out, _ = jax.jit(jax.vmap(functools.partial(attend, one)))(*mapped)
    np.testing.assert_allclose(out.reshape(q.shape), case.expected(q, k, v).out, atol=2e-5)
    shared = [mapped[0], mapped[1][0], mapped[2][0]]
    run = jax.vmap(functools.partial(attend, one), in_axes=(0, None, None))
    out, _ = jax.jit(run)(*shared)
    expected = one.expected(mapped[0][1], *shared[1:])
    np.testing.assert_allclose(out[1], expected.out, atol=2e-5)


def loss(q, k, v):
    out = flash_attention(q, k, v, is_causal=True, implementation="mosaic")
    return out.astype(jnp.float32).sum()


def lowered(function, *args):
    """Returns the StableHLO for CUDA of the gradients."""
    with hardware.assume_device_kind("NVIDIA H200"):
        traced = jax.jit(jax.grad(function, argnums=(0, 1, 2))).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def shapes(*lead, sharding=None):
    q = jax.ShapeDtypeStruct((*lead, 4, 64, 8, 64), jnp.bfloat16, sharding=sharding)
    k = jax.ShapeDtypeStruct((*lead, 4, 64, 4, 64), jnp.bfloat16, sharding=sharding)
    return q, k, k


def test_the_kernels_lower_with_batch_and_heads_sharded():
    sharding = NamedSharding(mesh_of(2, 4), PartitionSpec("data", None, "tensor"))
    text = lowered(loss, *shapes(sharding=sharding))
    assert text.count("@CustomSPMDPartitioning") == text.count("sdy.sharding_rule") == 2


def test_the_kernels_lower_under_vmap_scan_and_remat():
    def mapped(q, k, v):
        return jax.vmap(loss)(q, k, v).sum()

    def scanned(q, k, v):
        @jax.checkpoint
        def layer(q, _):
            out = flash_attention(q, k, v, is_causal=True, implementation="mosaic")
            return out, None

        return jax.lax.scan(layer, q, None, length=2)[0].astype(jnp.float32).sum()

    for text in (lowered(mapped, *shapes(3)), lowered(scanned, *shapes())):
        assert "flash_attention_fwd" in text and "flash_attention_bwd" in text
