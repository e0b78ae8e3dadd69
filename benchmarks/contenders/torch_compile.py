"""Peer: the same Llama shapes in PyTorch under torch.compile, in bf16 or with torchao's float8.

PyTorch's best ordinary settings: the whole loss in one torch.compile, float32 weights under
bfloat16 autocast, cuDNN attention (flash where cuDNN refuses), fused AdamW. torchao converts every
linear layer but the head, by its recipe `tensorwise` or `rowwise`.
"""

import contextlib
import dataclasses
import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import time_steps

_LEARNING_RATE = 1e-4
_GIB = 2**30


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on x [B, T, N, H]; cos and sin bfloat16 [1, T, 1, H // 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm decoder block on x [B, T, D]."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.head_dim = head_dim = model["head_dim"]
        self.num_heads, self.num_kv_heads = model["num_heads"], model["num_kv_heads"]
        size, ffn_size = model["hidden_size"], model["ffn_size"]
        linear = functools.partial(nn.Linear, bias=False)
        self.attention_norm = nn.RMSNorm(size, eps=model["norm_eps"])
        self.q = linear(size, self.num_heads * head_dim)
        self.k = linear(size, self.num_kv_heads * head_dim)
        self.v = linear(size, self.num_kv_heads * head_dim)
        self.out = linear(self.num_heads * head_dim, size)
        self.ffn_norm = nn.RMSNorm(size, eps=model["norm_eps"])
        self.gate, self.up = linear(size, ffn_size), linear(size, ffn_size)
        self.down = linear(ffn_size, size)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.attention_norm(x)
        q = self.q(y).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k(y).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v(y).unflatten(-1, (self.num_kv_heads, self.head_dim))
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin).transpose(1, 2),
            rotate(k, cos, sin).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Logits [B, T, V] of tokens int64 [B, T]; untied head."""

    def __init__(self, model: dict[str, Any], sequence_length: int):
        super().__init__()
        size, vocab_size, head_dim = model["hidden_size"], model["vocab_size"], model["head_dim"]
        self.embedding = nn.Embedding(vocab_size, size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model["num_layers"]))
        self.norm = nn.RMSNorm(size, eps=model["norm_eps"])
        self.head = nn.Linear(size, vocab_size, bias=False)
        frequency = model["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(sequence_length).float(), frequency)[None, :, None]
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.embedding(tokens).bfloat16()
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def convert_to_float8(model: nn.Module, recipe: str) -> None:
    """Puts torchao's float8 into every linear layer but the head."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    if not torch.cuda.is_available():
        config = dataclasses.replace(config, emulate=True)  # a CPU has no FP8 GEMM
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda _, name: name != "head"
    )


class TorchStep:
    """Model, optimizer and one random batch; `launch` queues a step."""

    def __init__(self, task: dict[str, Any]):
        self.is_cuda = torch.cuda.is_available()
        device = "cuda" if self.is_cuda else "cpu"
        torch.manual_seed(0)
        with torch.device(device):
            model = LanguageModel(task["model"], task["sequence_length"])
        if task["name"].startswith("torchao"):
            convert_to_float8(model, task["variant"])
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)
        size = (2, task["batch_size"], task["sequence_length"])
        self.batch = torch.randint(0, task["model"]["vocab_size"], size, device=device)
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16)
        self.attention = contextlib.nullcontext
        if self.is_cuda:
            self.attention = functools.partial(
                sdpa_kernel,
                [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
                set_priority=True,
            )

        def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())

        self.loss_function = torch.compile(loss) if task["compile"] else loss
        self.loss = torch.zeros(())

    def launch(self) -> Any:
        """Queues one step; returns the event of its end."""
        with self.autocast(), self.attention():
            loss = self.loss_function(*self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()
        if not self.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """Returns when the step has ended."""
        if event is not None:
            event.synchronize()


def kernel_names(step: TorchStep, count: int = 12) -> list[dict[str, Any]]:
    """The largest kernels of one step: which attention and which GEMMs really ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step.wait(step.launch())
        torch.cuda.synchronize()
    averages = sorted(profile.key_averages(), key=lambda x: -x.self_device_time_total)
    return [
        {"name": x.key[:120], "count": x.count, "ms": x.self_device_time_total / 1e3}
        for x in averages[:count]
    ]


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Times the peer's step. See `benchmarks.contenders`."""
    step = TorchStep(task)
    started = time.perf_counter()
    step.wait(step.launch())
    compile_time_s = time.perf_counter() - started
    times = time_steps(step.launch, step.wait, warmup=task["warmup"], steps=task["steps"])
    versions = {"torch": torch.__version__}
    if task["name"].startswith("torchao"):
        import torchao

        versions["torchao"] = torchao.__version__
    result = {
        "step_times_s": times.step_times_s,
        "launch_times_s": times.launch_times_s,
        "compile_time_s": compile_time_s,
        "loss_nats": float(step.loss),
        "device": torch.cuda.get_device_name() if step.is_cuda else "cpu",
        "versions": versions,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / _GIB if step.is_cuda else None,
        "compiled": task["compile"],
    }
    if step.is_cuda:
        result["cudnn"] = torch.backends.cudnn.version()
        try:
            result["largest_kernels"] = kernel_names(step)
        except RuntimeError as error:  # no profiler here; the times above stand without it
            result["profiler_error"] = str(error)
    return result
