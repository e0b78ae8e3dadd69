"""What is quantised and where its scales come from: a frozen value, static under `jax.jit`."""

import dataclasses
import fnmatch
from typing import Literal, get_args

from jfp8.formats import E4M3, E5M2, Format

RecipeName = Literal["bf16", "delayed", "current"]
GradientFormat = Literal["e5m2", "e4m3"]
Calibration = Literal["inline", "explicit"]
QuantizeImplementation = Literal["auto", "xla", "mosaic"]
GemmImplementation = Literal["xla", "mosaic_forward", "mosaic"]
WeightGradDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one layer's three GEMMs are computed.

    - `bf16`: no quantisation; GEMMs in the dtype of the activations.
    - `delayed`: one scale per tensor, the smallest power of two that held the amax of the last
      `amax_history_length` optimizer steps, times 2**margin. No quantisation waits for an amax
      (Transformer Engine's recipe, Micikevicius et al. 2022, arXiv:2209.05433).
    - `current`: one scale per tensor, from this very tensor; costs one more pass over it.

    Activations and weights are E4M3, gradients `gradient_format`.
    """

    name: RecipeName = "delayed"
    amax_history_length: int = 16
    """Optimizer steps that a delayed scale looks back; short: an outlier is soon forgotten."""
    margin: int = 0
    """Extra powers of two of headroom in every delayed scale."""
    gradient_format: GradientFormat = "e5m2"
    calibration: Calibration = "inline"
    """What a delayed scale without history does. inline: it takes this call's own amax. explicit:
    it is NaN, so misuse is loud; the caller runs the first step with `recipe.calibrating()`, and
    then no quantisation ever waits for an amax."""
    quantize_implementation: QuantizeImplementation = "auto"
    """Who casts and transposes. xla: any device and shape. mosaic: Pallas kernels for Hopper, one
    pass over each tensor; M and K must be multiples of 128, N of 64. Both cast alike. auto: each
    dot takes mosaic where its kernels can run, xla elsewhere, and where the partitioner is to split
    arrays among several devices (see `decided`)."""
    gemm_implementation: GemmImplementation = "xla"
    """Who runs the GEMMs. xla: any device, cuBLASLt on Hopper. mosaic_forward: the Pallas kernel
    for Hopper runs those that accumulate fast; K must be a multiple of 128, N of 64. mosaic: it
    runs dgrad and wgrad too, with exact accumulation; M and N must be multiples of 256."""
    weight_grad_dtype: WeightGradDtype = "float32"
    """What the GEMM of a float32 rhs's gradient writes. bfloat16 halves the memory traffic of every
    such gradient for one rounding, as torch's autocast does; the sum inside stays float32."""
    skip: tuple[str, ...] = ()
    """Glob patterns of layer names that stay in bf16 (see `for_layer`)."""

    def __post_init__(self) -> None:
        for field, choices in (
            ("name", get_args(RecipeName)),
            ("gradient_format", get_args(GradientFormat)),
            ("calibration", get_args(Calibration)),
            ("quantize_implementation", get_args(QuantizeImplementation)),
            ("gemm_implementation", get_args(GemmImplementation)),
            ("weight_grad_dtype", get_args(WeightGradDtype)),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"Recipe.{field}={value!r} must be one of {', '.join(choices)}")
        if self.amax_history_length < 1:
            raise ValueError(
                f"Recipe.amax_history_length={self.amax_history_length} must be at least 1"
            )
        if not -8 <= self.margin <= 8:
            raise ValueError(f"Recipe.margin={self.margin} must be in [-8, 8] (powers of two)")
        if isinstance(self.skip, str) or not all(isinstance(p, str) for p in self.skip):
            raise ValueError(
                f"Recipe.skip={self.skip!r} must be a tuple of glob patterns, such as ('*.down',)"
            )

    @property
    def quantizes(self) -> bool:
        """Whether GEMMs run in FP8."""
        return self.name != "bf16"

    @property
    def formats(self) -> tuple[Format, Format, Format]:
        """Formats of lhs, rhs and gradient. Never two E5M2: no hardware multiplies those."""
        return E4M3, E4M3, E5M2 if self.gradient_format == "e5m2" else E4M3

    def for_layer(self, name: str) -> "Recipe":
        """The recipe of the layer called `name`: bf16 if a pattern of `skip` matches, else this."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip):
            return dataclasses.replace(self, name="bf16")
        return self

    def calibrating(self) -> "Recipe":
        """This recipe, but each scale is of the step's own tensors; same state structure."""
        return dataclasses.replace(self, name="current") if self.quantizes else self
