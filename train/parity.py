"""Trains arms on the same data order and says whether they learn alike.

    python -m train.parity --config configs/llama_350m_bf16.toml \\
        --config configs/llama_350m_fp8.toml --seeds 2 --run.steps 1000

The first config is the reference; it is trained with `--seeds` different initial weights, and the
range of those is the band that the other gaps are seen against. Each arm is an ordinary run
directory, in a process of its own; the same command goes on where it was stopped. The result file
and the figure are written anew after each arm.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from train.config import ConfigError, TrainConfig, parse
from train.interrupt import Interrupt
from train.metrics import Metrics, MetricsError, read_metrics
from train.plots import TOLERANCE, plot_loss
from train.run_directory import CONFIG_FILE, VERSIONS_FILE, atomic_write, compare_config
from train.verdict import TOLERANCE_NATS, describe_run, judge, overall

_POLL_S = 0.2
_OWN_OPTIONS = ("run.name", "run.directory", "run.resume", "run.seed", "data.order-seed")
# What must be equal for a comparison to mean anything.
_SAME = ("run.steps", "run.seed", "data.*", "model.vocab_size", "optimizer.accumulation_steps")
_LABELS = ("run.name", "run.directory", "run.resume", "data.cache_directory")
_VERSIONS = ("python", "jax", "jaxlib", "flax", "optax", "git_commit", "device", "device_count")
PASS, FAIL, BAD_INPUT, INCOMPLETE = 0, 1, 2, 3
"""Exit codes; 128 + the signal's number after SIGINT or SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Compares configs by training them; other options, such as --run.steps, go to every arm."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A TOML config; give two or more, the reference (bf16) first."""
    seeds: int = 2
    """Runs of the reference, each with other initial weights; two or more give a band."""
    seed: int = 0
    """Seed of the data order of every arm, and of the first initial weights."""
    output: Path = Path("runs/parity")
    """Folder for the arms' run directories, parity.json and parity.png."""
    deadline_s: float = 0.0
    """Stop and save in time to be done after this long; 0 means never."""
    save_s: float = 60.0
    """How long before the deadline the running arm is asked to save and stop."""

    def check(self) -> None:
        """Raises ConfigError for values that cannot be."""
        if len(self.config) < 2:
            raise ConfigError(
                f"--config was given {len(self.config)} times; give two or more, reference first"
            )
        if self.seeds < 1:
            raise ConfigError(f"--seeds={self.seeds} must be at least 1")
        if self.deadline_s and not 0 < self.save_s < self.deadline_s:
            raise ConfigError(
                f"--save-s={self.save_s:g} must be positive and below"
                f" --deadline-s={self.deadline_s:g}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One run of the comparison."""

    name: str
    config: TrainConfig
    arguments: tuple[str, ...]
    """Of `python -m train.main`."""
    is_seed: bool
    """A further seed of the reference, for the band."""

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.directory)

    def metrics(self) -> Metrics | None:
        """What it has measured so far; None before its first step."""
        try:
            return read_metrics(self.directory)
        except MetricsError:
            return None

    def is_complete(self) -> bool:
        """Whether it has done all its steps, validation included."""
        metrics, config = self.metrics(), self.config
        if metrics is None or metrics.train[-1]["step"] < config.run.steps:
            return False
        if not config.log.validate_every:
            return True
        return bool(metrics.validation) and metrics.validation[-1]["step"] == config.run.steps


def make_arms(options: ParityConfig, overrides: Sequence[str]) -> list[Arm]:
    """The runs in the order in which they are trained: the reference, the others, more seeds.

    Raises:
      ConfigError: two configs have one name, an override belongs to this program, or the arms
        would not see the same data.
    """
    for word in overrides:
        name = word.removeprefix("--").partition("=")[0].replace("_", "-")
        if name in _OWN_OPTIONS:
            raise ConfigError(f"--{name} is set by train.parity; see its --seed and --output")
    stems = [path.stem for path in options.config]
    if len(set(stems)) < len(stems):
        raise ConfigError(f"--config: the names {', '.join(stems)} must differ")

    def make(path: Path, seed: int, name: str, *, is_seed: bool) -> Arm:
        own = {
            "run.name": name,
            "run.directory": options.output / name,
            "run.seed": seed,
            "data.order-seed": options.seed,
        }
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        arguments = ("--config", str(path), *overrides, *words)
        return Arm(name=name, config=parse(arguments), arguments=arguments, is_seed=is_seed)

    arms = [
        make(path, options.seed, stem, is_seed=False)
        for path, stem in zip(options.config, stems, strict=True)
    ]
    for arm in arms[1:]:
        _require_same_data(arms[0], arm)
    seeds = range(options.seed + 1, options.seed + options.seeds)
    return arms + [
        make(options.config[0], seed, f"{stems[0]}_seed{seed}", is_seed=True) for seed in seeds
    ]


def _require_same_data(reference: Arm, arm: Arm) -> None:
    differing = [
        f"  --{name.replace('_', '-')}: {theirs!r} and {ours!r}"
        for name, theirs, ours in differences(reference.config, arm.config)
        if name in _SAME or f"{name.partition('.')[0]}.*" in _SAME
    ]
    if differing:
        raise ConfigError(
            f"{reference.name} and {arm.name} would not learn from the same data:\n"
            + "\n".join(differing)
            + "\ngive one value for all arms, such as --run.steps 1000"
        )


def differences(a: TrainConfig, b: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields (section.field, value in a, value in b) where two configs differ, labels left out."""
    for section in dataclasses.fields(TrainConfig):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for field in dataclasses.fields(left):
            name = f"{section.name}.{field.name}"
            values = getattr(left, field.name), getattr(right, field.name)
            if values[0] != values[1] and name not in _LABELS:
                yield name, *values


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; `arguments` is what follows the program name, None the command line's."""
    with Interrupt() as interrupt, interrupt.deferred():
        try:
            options, overrides = tyro.cli(
                ParityConfig,
                prog="python -m train.parity",
                args=arguments,
                return_unknown_args=True,
            )
            options.check()
            arms = make_arms(options, overrides)
            return _Comparison(options, arms, overrides, interrupt).execute()
        except (ConfigError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT


class _Comparison:
    """Trains the arms one after the other and writes the result."""

    def __init__(
        self,
        options: ParityConfig,
        arms: list[Arm],
        overrides: Sequence[str],
        interrupt: Interrupt,
    ):
        self.options, self.arms, self.overrides = options, arms, list(overrides)
        self.interrupt = interrupt
        self.started = time.monotonic()
        self.failed: dict[str, int] = {}

    def execute(self) -> int:
        for number, arm in enumerate(self.arms, start=1):
            title = f"arm {number} of {len(self.arms)}, {arm.name}"
            if arm.is_complete():
                # A finished run of another experiment must not pass for this one.
                compare_config(arm.directory / CONFIG_FILE, arm.config)
                _say(f"{title}: already trained")
            elif self._must_stop():
                _say(f"{title}: not started; run the same command to go on")
            else:
                _say(f"{title}: {arm.directory}")
                code = self._train(arm)
                if code == BAD_INPUT:
                    return BAD_INPUT
                if code and not self._must_stop():
                    self.failed[arm.name] = code
                    _say(f"{title}: ended with exit code {code}")
            self._write()
        result = self._write()
        for line in format_result(result):
            _say(line)
        if self.interrupt.number:
            return 128 + self.interrupt.number
        return {"pass": PASS, "fail": FAIL, "incomplete": INCOMPLETE}[result["verdict"]]

    def _left_s(self) -> float:
        limit = self.options.deadline_s
        return limit - (time.monotonic() - self.started) if limit else float("inf")

    def _must_stop(self) -> bool:
        return bool(self.interrupt.number) or self._left_s() <= self.options.save_s

    def _train(self, arm: Arm) -> int:
        """Runs `python -m train.main`; asks it to save before the deadline, kills it at it."""
        command = [sys.executable, "-m", "train.main", *arm.arguments]
        # In a session of its own: Ctrl-C comes here alone, and is handed on once.
        with subprocess.Popen(command, start_new_session=True) as process:
            is_asked = False
            while process.poll() is None:
                if not is_asked and self._must_stop():
                    is_asked = True
                    _say(f"{arm.name}: asked to save and stop")
                    process.terminate()
                if self._left_s() <= 0:
                    process.kill()
                time.sleep(_POLL_S)
        return process.returncode

    def _write(self) -> dict[str, Any]:
        """Writes parity.json and parity.png from what there is; returns the result."""
        options = self.options
        options.output.mkdir(parents=True, exist_ok=True)
        result = summarize(self.arms, self.overrides, self.failed)
        text = json.dumps(result, indent=1, allow_nan=False)
        atomic_write(options.output / "parity.json", text + "\n")
        begun = [arm for arm in self.arms if arm.metrics() is not None]
        seeds = [arm.directory for arm in begun if arm.is_seed]
        shown = [arm.directory for arm in begun if not arm.is_seed]
        if shown and begun[0] is self.arms[0]:
            band = [shown[0], *seeds] if seeds else []
            plot_loss(shown, options.output / "parity.png", band=band)
        return result


def summarize(
    arms: Sequence[Arm], overrides: Sequence[str], failed: dict[str, int]
) -> dict[str, Any]:
    """The result of a comparison, finished or not, JSON-able.

    Args:
      arms: from `make_arms`; the first is the reference.
      overrides: options that every arm got.
      failed: name -> exit code of the arms that cannot go on; their verdict is "fail".
    """
    reference = arms[0]
    reference_metrics = reference.metrics()
    rows = []
    for arm in arms:
        metrics = arm.metrics()
        row: dict[str, Any] = {
            "name": arm.name,
            "config": arm.arguments[1],
            "seed": arm.config.run.seed,
            "differs_in": {n: [a, b] for n, a, b in differences(reference.config, arm.config)},
            "is_complete": arm.is_complete(),
            "versions": _versions(arm.directory),
            **(describe_run(metrics) if metrics else {}),
        }
        if arm is not reference:
            is_complete = arm.is_complete() and reference.is_complete()
            row |= judge(metrics, reference_metrics, is_complete=is_complete)
        if arm.name in failed:
            row |= {"verdict": "fail", "exit_code": failed[arm.name]}
        rows.append(row)
    judged = [row["verdict"] for row in rows[1:] if row["seed"] == reference.config.run.seed]
    if reference.name in failed:
        judged.append("fail")
    return {
        "verdict": overall(judged),
        "tolerance_relative": TOLERANCE,
        "tolerance_nats": TOLERANCE_NATS,
        "reference": reference.name,
        "overrides": list(overrides),
        "arms": rows,
    }


def format_result(result: dict[str, Any]) -> Iterator[str]:
    """The lines of a result for people."""
    yield (
        f"gaps to {result['reference']}; a gap passes up to {result['tolerance_relative']:.2%} or"
        f" {result['tolerance_nats']} nats"
    )
    reference_seed = result["arms"][0]["seed"]
    for row in result["arms"][1:]:
        gaps = [
            f"{name} {gap['loss_nats']:.4f} ({gap['relative']:+.3%}, {gap['nats']:+.4f} nats)"
            if (gap := row.get(f"{name}_gap"))
            else f"{name} -"
            for name in ("train", "validation")
        ]
        word = row["verdict"] if row["seed"] == reference_seed else f"seed {row['seed']}, the band"
        yield f"  {row['name']}: {'; '.join(gaps)}: {word}"
    yield f"verdict: {result['verdict']}"


def _versions(directory: Path) -> dict[str, Any]:
    try:
        versions = json.loads((directory / VERSIONS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return {name: versions[name] for name in _VERSIONS if name in versions}


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
