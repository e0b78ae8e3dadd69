"""Every option of the trainer: frozen dataclasses, read from TOML and the command line.

A TOML file is flattened into command-line arguments and put before the real ones, so a later value
wins and both share one parser and one style of error. Each class checks its own fields,
`TrainConfig` what spans several; all of it happens without touching a device.
"""

import dataclasses
import math
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

import tyro

from train.arguments import capitalise_booleans, is_torn, take_config_file
from train.toml_text import flatten

FP8_ALIGNMENT = 16  # cuBLASLt and wgmma take 8-bit operands in units of 16 bytes.

RecipeName = Literal["bf16", "delayed", "current"]
AttentionPrecision = Literal["bf16", "fp8", "fp8_forward"]
AttentionImplementation = Literal["auto", "xla", "cudnn", "mosaic"]
KernelImplementation = Literal["auto", "xla", "mosaic"]
RopeImplementation = Literal[KernelImplementation, "fused"]


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot be trained with."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What is run, for how long, and where its files go."""

    name: str = ""
    """Name of the run; empty takes the name of the config file."""
    directory: str = ""
    """Folder for metrics, checkpoints and plots; empty means runs/<name>."""
    steps: int = 300
    """Number of optimizer steps."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest good checkpoint; never: refuse a used directory; must: refuse an
    empty one."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"--run.steps={self.steps} must be at least 1")
        _require(0 <= self.seed < 2**31, f"--run.seed={self.seed} must be in [0, 2**31)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of decoder blocks."""
    ffn_size: int = 384
    """Width of the SwiGLU hidden layer."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads; divides num_heads."""
    head_dim: int = 0
    """Width of one head; 0 means hidden_size / num_heads."""
    vocab_size: int = 2048
    """Rows of the embedding; token ids are below it."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (arXiv:2010.04245)."""
    tie_embeddings: bool = False
    """Use the embedding as output head too."""
    embedding_multiplier: float = 50.0
    """The blocks read the embedding times this, which begins with variance 1: the larger it is, the
    faster embeddings are learnt. 1 as in Llama."""
    local_window_size: int = 0
    """Attend to this many previous positions only; 0 means all."""
    attention_precision: AttentionPrecision = "bf16"
    """Precision of the attention GEMMs; fp8_forward has its backward in bf16."""
    attention_implementation: AttentionImplementation = "auto"
    """Attention kernel; auto takes the best one that can run and says which."""
    attention_deterministic: bool = False
    """Gradients of attention that are the same bit for bit on every run; about 35 % slower."""
    norm_implementation: KernelImplementation = "auto"
    """Gradient of the blocks' RMSNorms. mosaic: Hopper's Pallas kernel, which adds that of the
    residual connection; hidden sizes k * 1024 up to 4096. auto: mosaic where it can run."""
    rope_implementation: RopeImplementation = "auto"
    """Rotary positions. mosaic: Hopper's Pallas kernel for their gradient, which puts q, k and v
    together; not with qk-norm. fused: in the kernels that cast for FP8 attention, on one GPU."""
    swiglu_implementation: KernelImplementation = "auto"
    """SwiGLU's activation and its gradient in 16 bits. mosaic: Hopper's Pallas kernels. Where
    kernels cast (--fp8.quantize-implementation) they quantise the activation as they compute it."""
    layer_loop: Literal["scan", "unroll"] = "scan"
    """scan: one compiled block over stacked weights (fast compile); unroll: separate blocks (fast
    step)."""
    remat: Literal["none", "dots", "attention", "block"] = "none"
    """What the backward recomputes: nothing; all but GEMM and attention outputs; all but attention;
    whole blocks."""

    def __post_init__(self) -> None:
        sizes = "hidden_size", "num_layers", "ffn_size", "num_heads", "num_kv_heads", "vocab_size"
        for name in sizes:
            value = getattr(self, name)
            _require(value >= 1, f"--model.{name.replace('_', '-')}={value} must be at least 1")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"--model.num-heads={self.num_heads} must be a multiple of"
            f" --model.num-kv-heads={self.num_kv_heads}",
        )
        _require(
            self.head_dim > 0 or (self.head_dim == 0 and self.hidden_size % self.num_heads == 0),
            f"--model.hidden-size={self.hidden_size} must be a multiple of"
            f" --model.num-heads={self.num_heads}; change one of them or set --model.head-dim",
        )
        _require(
            self.resolved_head_dim % 2 == 0,
            f"head dim {self.resolved_head_dim} must be even for rotary positions;"
            " set --model.head-dim",
        )
        head_dim = self.resolved_head_dim
        _require(
            self.attention_precision == "bf16" or head_dim & (head_dim - 1) == 0,
            f"--model.attention-precision={self.attention_precision} needs a head dim that is a"
            f" power of two, not {head_dim}; set --model.head-dim",
        )
        _require(
            self.local_window_size >= 0,
            f"--model.local-window-size={self.local_window_size} must be >= 0",
        )
        _require(
            self.rope_implementation not in ("mosaic", "fused") or not self.qk_norm,
            "--model.rope-implementation=mosaic or fused cannot run with --model.qk-norm; use auto",
        )
        _require(
            self.swiglu_implementation != "mosaic" or self.ffn_size % 128 == 0,
            f"--model.ffn-size={self.ffn_size} must be a multiple of 128 for"
            f" --model.swiglu-implementation={self.swiglu_implementation}; change it, or use auto",
        )
        for name in ("embedding_multiplier", "rope_theta", "norm_eps"):
            value, option = getattr(self, name), f"--model.{name.replace('_', '-')}"
            _require(0 < value < math.inf, f"{option}={value} must be positive and finite")

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head, with the default filled in."""
        return self.head_dim or self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Config:
    """How the GEMMs of the blocks are quantised. docs: `jfp8.Recipe`."""

    recipe: RecipeName = "delayed"
    """bf16: no FP8; delayed: scales from the amax history; current: from this step's tensors."""
    amax_history_length: int = 16
    """Optimizer steps that a delayed scale looks back."""
    margin: int = 0
    """Extra powers of two of headroom in every delayed scale."""
    gradient_format: Literal["e5m2", "e4m3"] = "e5m2"
    """8-bit format of the output gradients."""
    skip_layers: tuple[str, ...] = ()
    """Glob patterns of GEMM names (such as "*.down") that stay in bf16."""
    head: bool = False
    """Run the three GEMMs of the output head in FP8 too; never with the recipe bf16."""
    quantize_implementation: KernelImplementation = "auto"
    """xla: any device. mosaic: Hopper's Pallas kernels, which cast and transpose in one pass."""
    gemm_implementation: Literal["xla", "mosaic_forward", "mosaic"] = "xla"
    """Of the blocks' GEMMs. xla: any device. mosaic: Hopper's Pallas kernel."""
    weight_grad_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What weight-gradient GEMMs write, under any recipe; sums over microbatches are float32."""
    minimum_fraction: float = 0.95
    """On a GPU, stop before the first step if less of the block GEMM FLOPs runs in FP8."""
    inspect_every: int = 0
    """Optimizer steps between measurements of every tensor of every layer; 0 means never."""

    def __post_init__(self) -> None:
        _require(
            self.amax_history_length >= 1,
            f"--fp8.amax-history-length={self.amax_history_length} must be at least 1",
        )
        _require(-8 <= self.margin <= 8, f"--fp8.margin={self.margin} must be in [-8, 8]")
        _require(
            0 <= self.minimum_fraction <= 1,
            f"--fp8.minimum-fraction={self.minimum_fraction} must be in [0, 1]",
        )
        _require(self.inspect_every >= 0, f"--fp8.inspect-every={self.inspect_every} must be >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from and how it becomes batches."""

    path: tuple[str, ...] = ("python-stdlib",)
    """Files or folders; "python-stdlib" is the source text of this Python's own library,
    "python-packages" that of the packages installed beside it."""
    format: Literal["auto", "text", "jsonl", "parquet", "tokens"] = "auto"
    """Kind of the files; auto goes by their endings."""
    glob: str = "**/*"
    """Which files of a folder are read."""
    text_column: str = "text"
    """Field of a JSONL line or column of a Parquet file that holds the text."""
    tokenizer: str = ""
    """A tokenizer.json to load; empty trains a byte-level BPE of model.vocab-size tokens."""
    tokenizer_training_bytes: int = 8_000_000
    """At most this much text trains the tokenizer."""
    max_bytes: int = 0
    """Read at most this much text; 0 means all."""
    sequence_length: int = 128
    """Tokens of one training sequence."""
    batch_size: int = 16
    """Sequences of one optimizer step, over all devices and microbatches."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by hash, that is held out."""
    validation_unit: Literal["document", "folder"] = "document"
    """What is held out whole: a document, or all below one entry of the folder data.path."""
    document_mask: bool = True
    """Attention and positions stop at document borders inside a packed sequence."""
    shuffle: bool = True
    """Visit the sequences in a seeded random order, a new one each epoch."""
    order_seed: int = -1
    """Seed of that order; -1 takes run.seed."""
    cache_directory: str = ".cache/jfp8/tokens"
    """Tokenised text is kept here, keyed by its sources and tokenizer."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "--data.path needs at least one file or folder")
        _require(
            self.sequence_length >= 2,
            f"--data.sequence-length={self.sequence_length} must be at least 2",
        )
        _require(self.batch_size >= 1, f"--data.batch-size={self.batch_size} must be at least 1")
        _require(
            0 <= self.validation_fraction < 0.9,
            f"--data.validation-fraction={self.validation_fraction} must be in [0, 0.9)",
        )
        _require(self.max_bytes >= 0, f"--data.max-bytes={self.max_bytes} must be >= 0")
        _require(
            self.tokenizer_training_bytes >= 1,
            f"--data.tokenizer-training-bytes={self.tokenizer_training_bytes} must be at least 1",
        )
        _require(
            -1 <= self.order_seed < 2**31,
            f"--data.order-seed={self.order_seed} must be -1 or in [0, 2**31)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """optax chain: clipping, AdamW or Muon, learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw (arXiv:1711.05101), or muon on the matrices of the blocks with adamw on the rest."""
    learning_rate: float = 2e-3
    """Peak learning rate (of adamw, and of the adamw part of muon)."""
    muon_learning_rate: float = 2e-2
    """Peak learning rate of the matrices under muon."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, warm-up-stable-decay, or no decay."""
    warmup_steps: int = 20
    """Linear warm-up from zero."""
    decay_fraction: float = 0.2
    """Share of the steps that wsd decays over, at the end."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step over the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 means never."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the first moment."""
    accumulation_steps: int = 1
    """Microbatches whose gradients are averaged into one optimizer step."""
    max_consecutive_skips: int = 10
    """Stop after this many non-finite steps in a row."""
    z_loss: float = 0.0
    """Weight of the squared log-partition (PaLM, arXiv:2204.02311); 0 means none."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0,
                f"--optimizer.{name.replace('_', '-')}={value} must be positive and finite",
            )
        for name in ("beta1", "beta2"):
            _require(
                0 <= getattr(self, name) < 1,
                f"--optimizer.{name}={getattr(self, name)} must be in [0, 1)",
            )
        for name in ("warmup_steps", "weight_decay", "clip_norm", "z_loss"):
            _require(
                getattr(self, name) >= 0,
                f"--optimizer.{name.replace('_', '-')}={getattr(self, name)} must be >= 0",
            )
        for name in ("accumulation_steps", "max_consecutive_skips"):
            _require(
                getattr(self, name) >= 1,
                f"--optimizer.{name.replace('_', '-')}={getattr(self, name)} must be at least 1",
            )
        for name in ("decay_fraction", "final_learning_rate_ratio"):
            _require(
                0 <= getattr(self, name) <= 1,
                f"--optimizer.{name.replace('_', '-')}={getattr(self, name)} must be in [0, 1]",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: int = 100
    """Optimizer steps between checkpoints; the last step is always saved. 0 saves nothing."""
    keep: int = 2
    """Newest checkpoints that are kept; the one with the best validation loss stays besides."""
    verify: bool = True
    """Write a checksum of every file, and check it before resuming."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"--checkpoint.every={self.every} must be >= 0")
        _require(self.keep >= 1, f"--checkpoint.keep={self.keep} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is measured and where it is shown."""

    every: int = 1
    """Optimizer steps between metric lines."""
    validate_every: int = 100
    """Optimizer steps between validations; the last step is always validated. 0 means never."""
    validation_batches: int = 8
    """Batches of one validation."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs the extra `wandb`)."""
    sample_prompt: str = "def "
    """A continuation of this text is generated at the end; empty means none."""
    sample_tokens: int = 64
    """Length of that continuation."""
    peak_tflops: float = 0.0
    """Peak of one device for the MFU; 0 takes the dense bf16 peak of a known GPU."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"--log.every={self.every} must be at least 1")
        for name in ("validate_every", "sample_tokens", "peak_tflops"):
            _require(
                getattr(self, name) >= 0,
                f"--log.{name.replace('_', '-')}={getattr(self, name)} must be >= 0",
            )
        _require(
            self.validation_batches >= 1,
            f"--log.validation-batches={self.validation_batches} must be at least 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1 (all that remain)."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Parts of every weight and moment, gathered when used; the batch is split along it too."""
    tensor: int = 1
    """Parts of heads and FFN columns."""
    distributed: bool = False
    """Join the other processes of a SLURM, MPI or Kubernetes job (`jax.distributed.initialize`)."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            _require(value == -1 or value >= 1, f"--mesh.{name}={value} must be -1 or at least 1")
        _require(
            [self.data, self.fsdp, self.tensor].count(-1) <= 1,
            "only one of --mesh.data, .fsdp, .tensor may be -1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Trains a Llama-family language model, by default in FP8."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    fp8: Fp8Config = Fp8Config()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        microbatches = self.optimizer.accumulation_steps
        _require(
            self.data.batch_size % microbatches == 0,
            f"--data.batch-size={self.data.batch_size} must be a multiple of"
            f" --optimizer.accumulation-steps={microbatches}",
        )
        if self.fp8.recipe != "bf16":
            self._require_fp8_alignment()

    @property
    def order_seed(self) -> int:
        """Seed of the data order, with the default filled in."""
        return self.run.seed if self.data.order_seed < 0 else self.data.order_seed

    def _require_fp8_alignment(self) -> None:
        model, head_dim = self.model, self.model.resolved_head_dim
        tokens = (
            self.data.batch_size // self.optimizer.accumulation_steps * self.data.sequence_length
        )
        for what, size in (
            (f"--model.hidden-size={model.hidden_size}", model.hidden_size),
            (f"--model.ffn-size={model.ffn_size}", model.ffn_size),
            (f"num_heads * head_dim = {model.num_heads * head_dim}", model.num_heads * head_dim),
            (
                f"num_kv_heads * head_dim = {model.num_kv_heads * head_dim}",
                model.num_kv_heads * head_dim,
            ),
            (
                "tokens of a microbatch (batch-size / accumulation-steps * sequence-length)"
                f" = {tokens}",
                tokens,
            ),
            *(
                [(f"--model.vocab-size={model.vocab_size} (--fp8.head)", model.vocab_size)]
                if self.fp8.head
                else []
            ),
        ):
            _require(
                size % FP8_ALIGNMENT == 0,
                f"{what} must be a multiple of {FP8_ALIGNMENT} for --fp8.recipe={self.fp8.recipe}"
                " (8-bit GEMMs take whole units of 16); change it, or use --fp8.recipe bf16",
            )


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Reads `[--config FILE.toml] [--section.key value ...]`; later values win.

    Args:
      arguments: what follows the program name.

    Returns: the resolved config, with `run.name` and `run.directory` filled in.

    Raises:
      SystemExit: with a message on stderr, for an unknown key (with the nearest name), a wrong type
        or a value that a class refuses, in the file or on the command line.
    """
    arguments = list(arguments)
    for argument in arguments:
        if "\0" in argument or is_torn(argument):
            _exit(f"the argument {argument!r} is not text in UTF-8; rename the file, or link to it")
    try:
        file, arguments = take_config_file(arguments)
        table = tomllib.loads(file.read_text()) if file else {}
        from_file = list(flatten(table))
    except (OSError, ValueError) as error:
        _exit(f"--config: {error}")
    try:
        config = tyro.cli(
            TrainConfig,
            prog="python -m train.main",
            args=capitalise_booleans([*from_file, *arguments], TrainConfig()),
            config=(tyro.conf.FlagConversionOff,),
        )
    except ConfigError as error:
        _exit(str(error))
    name = config.run.name or (file.stem if file else "tiny_cpu")
    directory = config.run.directory or str(Path("runs") / name)
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, name=name, directory=directory)
    )


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
