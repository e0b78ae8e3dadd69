"""Steps that the sm_90 kernels share, where plain JAX can run them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import divmod_traced


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 127, 128, 641, 1 << 14, (1 << 20) - 1])
def test_divmod_by_a_traced_number_is_exact(divisor):
    multiples = np.arange(0, 1 << 21, divisor)
    multiples = np.append(multiples[:1000], multiples[-1000:])  # the largest are the hardest
    # Next to multiples the quotient changes.
    x = np.clip(np.add.outer([-1, 0, 1], multiples), 0, (1 << 21) - 1)
    quotient, rest = divmod_traced(jnp.asarray(x, jnp.int32), jnp.int32(divisor))
    np.testing.assert_array_equal(quotient, x // divisor)
    np.testing.assert_array_equal(rest, x % divisor)


def test_divmod_of_the_step_before_the_first():
    quotient, rest = divmod_traced(jnp.int32(-1), jnp.int32(5))
    assert (int(quotient), int(rest)) == (0, -1)
