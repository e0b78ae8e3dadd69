"""Trains arms on the same data order and says whether they learn alike.

    python -m train.parity --config configs/llama_125m_bf16.toml \\
        --config configs/llama_125m_fp8.toml --seeds 3

The first config is the reference. Every config is trained with `--seeds` different initial weights
(the others with fewer by `--arm-seeds`), and each run is compared with the reference's run of the
same seed; `train.verdict` says what passes. Each run is an ordinary run directory, trained in a
process of its own; the same command goes on where it was stopped. The result file and the figure
are written anew after each run.

A finished run is taken as it is, from metrics.jsonl and config.toml alone, wherever it was trained.
It is refused if its config is another one, or if it did not begin like the first run: with another
tokenizer, or a far larger or smaller loss or gradient, as after a change of data or initialisation.
The version of the code is noted in parity.json, and not compared.
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
from train.plots import TOLERANCE, SeedPair, plot_loss
from train.run_directory import CONFIG_FILE, VERSIONS_FILE, atomic_write, compare_config
from train.verdict import TOLERANCE_NATS, describe_run, judge, overall, pair_gaps

_POLL_S = 0.2
_OWN_OPTIONS = ("run.name", "run.directory", "run.resume", "run.seed", "data.order-seed")
# What must be equal for a comparison to mean anything.
_SAME = ("run.steps", "run.seed", "data.*", "model.vocab_size", "optimizer.accumulation_steps")
_LABELS = ("run.name", "run.directory", "run.resume", "data.cache_directory")
_TOKENIZER_FILE = "tokenizer.json"
_VERSIONS = ("python", "jax", "jaxlib", "flax", "optax", "git_commit", "device", "device_count")
PASS, FAIL, BAD_INPUT, INCOMPLETE, INCONCLUSIVE = 0, 1, 2, 3, 4
"""Exit codes; 128 + the signal's number after SIGINT or SIGTERM."""

# How far apart loss and gradient norm of the first step may be, relatively. FP8 moves them by less
# than 0.1 % and 2 %, another seed by a few per cent; another initialisation by far more.
_FIRST_STEP = {"loss_nats": 0.02, "grad_norm": 0.5}
# Options of the model that leave its weights alone; models that differ in others begin differently.
_WEIGHTLESS = ("_implementation", "_precision", "_deterministic", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Compares configs by training them; other options, such as --run.steps, go to every arm."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A TOML config; give two or more, the reference (bf16) first."""
    seeds: int = 3
    """Runs of the reference, each with other initial weights; two or more give a band."""
    arm_seeds: int = 0
    """With how many of these seeds the other configs are trained too; 0 means with all. One seed
    cannot tell an effect from noise unless the band is very narrow."""
    repeats: int = 0
    """Further runs of the reference with the first seed. Where kernels add in any order, as on a
    GPU, they differ, and that is counted as noise too."""
    seed: int = 0
    """Seed of the data order of every run, and of the first initial weights."""
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
        if not 0 <= self.arm_seeds <= self.seeds:
            raise ConfigError(
                f"--arm-seeds={self.arm_seeds} must be in [0, {self.seeds}]: each run is compared"
                f" with one of the --seeds={self.seeds} of the reference"
            )
        if self.repeats < 0:
            raise ConfigError(f"--repeats={self.repeats} must be at least 0")
        if self.deadline_s and not 0 < self.save_s < self.deadline_s:
            raise ConfigError(
                f"--save-s={self.save_s:g} must be positive and below"
                f" --deadline-s={self.deadline_s:g}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One run of the comparison."""

    name: str
    stem: str
    """Name of the config file; the runs that share it are compared as one."""
    config: TrainConfig
    arguments: tuple[str, ...]
    """Of `python -m train.main`."""
    is_repeat: bool
    """Repeats the first run, for the noise."""

    @property
    def seed(self) -> int:
        """Of its initial weights."""
        return self.config.run.seed

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

    def is_complete(self, metrics: Metrics | None) -> bool:
        """Whether it has done all its steps, validation included, by its `metrics()`."""
        config = self.config
        if metrics is None or metrics.train[-1]["step"] < config.run.steps:
            return False
        if not config.log.validate_every:
            return True
        return bool(metrics.validation) and metrics.validation[-1]["step"] == config.run.steps


def make_arms(options: ParityConfig, overrides: Sequence[str]) -> list[Arm]:
    """The runs in the order in which they are trained: all configs seed by seed, then repeats.

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

    def make(path: Path, index: int, repeat: int = 0) -> Arm:
        seed = options.seed + index
        name = path.stem + (f"_seed{seed}" if index else "") + (f"_repeat{repeat}" * (repeat > 0))
        own = {
            "run.name": name,
            "run.directory": options.output / name,
            "run.seed": seed,
            "data.order-seed": options.seed,
        }
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        arguments = ("--config", str(path), *overrides, *words)
        config = parse(arguments)
        is_repeat = repeat > 0
        return Arm(
            name=name, stem=path.stem, config=config, arguments=arguments, is_repeat=is_repeat
        )

    reference, *others = options.config
    arms = []
    for index in range(options.seeds):
        arms.append(make(reference, index))
        if index < (options.arm_seeds or options.seeds):
            arms += [make(path, index) for path in others]
    arms += [make(reference, 0, repeat + 1) for repeat in range(options.repeats)]
    for arm in arms[1 : len(options.config)]:
        _require_same_data(arms[0], arm)
    return arms


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
            if arm.is_complete(arm.metrics()):
                # A finished run of another experiment must not pass for this one.
                compare_config(arm.directory / CONFIG_FILE, arm.config)
                self._require_same_start(arm)
                _say(f"{title}: already trained")
                continue
            if self._must_stop():
                _say(f"{title}: not started; run the same command to go on")
            else:
                _say(f"{title}: {arm.directory}")
                code = self._train(arm)
                if code == BAD_INPUT:
                    return BAD_INPUT
                if code and not self._must_stop():
                    self.failed[arm.name] = code
                    _say(f"{title}: ended with exit code {code}")
                if not code:
                    self._require_same_start(arm)
            self._write()
        result = self._write()
        for line in format_result(result):
            _say(line)
        if self.interrupt.number:
            return 128 + self.interrupt.number
        codes = {"pass": PASS, "inconclusive": INCONCLUSIVE, "incomplete": INCOMPLETE}
        return codes.get(result["verdict"], FAIL)

    def _require_same_start(self, arm: Arm) -> None:
        """Raises ConfigError if a run cannot be compared with the first one."""
        differing = list(_differences_at_start(self.arms[0], arm))
        if differing:
            raise ConfigError(
                f"{arm.directory} did not begin like {self.arms[0].directory}:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\nOne of them was trained with other data or by another version of this code:"
                " move it away to have it trained again, or choose another --output"
            )

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
        metrics = {arm.name: arm.metrics() for arm in self.arms}
        result = summarize(self.arms, metrics, self.overrides, self.failed)
        text = json.dumps(result, indent=1, allow_nan=False)
        atomic_write(options.output / "parity.json", text + "\n")
        self._draw([arm for arm in self.arms if metrics[arm.name] and not arm.is_repeat])
        return result

    def _draw(self, begun: Sequence[Arm]) -> None:
        """Writes parity.png: the first seed of each config, the other seeds' gaps, the band."""
        first, output = self.arms[0], self.options.output
        if not begun or begun[0] is not first:
            return
        shown = [arm for arm in begun if arm.seed == first.seed]
        stems = [arm.stem for arm in shown]
        references = {arm.seed: arm for arm in begun if arm.stem == first.stem}
        pairs = [
            SeedPair(stems.index(arm.stem), arm.directory, references[arm.seed].directory)
            for arm in begun
            if arm not in shown and arm.stem in stems[1:] and arm.seed in references
        ]
        band = [arm.directory for arm in references.values()] if len(references) > 1 else []
        plot_loss([arm.directory for arm in shown], output / "parity.png", band=band, pairs=pairs)


def _differences_at_start(first: Arm, arm: Arm) -> Iterator[str]:
    """Yields what shows that two runs did not begin alike, so far as both are there."""
    tokenizers = [a.directory / _TOKENIZER_FILE for a in (first, arm)]
    if all(path.exists() for path in tokenizers):
        theirs, ours = (path.read_bytes() for path in tokenizers)
        if theirs != ours:
            yield f"{_TOKENIZER_FILE} is another one"
    changed = [name for name, _, _ in differences(first.config, arm.config)]
    if any(n.startswith("model.") and not n.endswith(_WEIGHTLESS) for n in changed):
        return
    records = [m.train[0] for m in (first.metrics(), arm.metrics()) if m is not None]
    if [record["step"] for record in records] != [1, 1]:
        return
    for name, limit in _FIRST_STEP.items():
        theirs, ours = (record.get(name) for record in records)
        # A run that begins with a NaN is for the verdict.
        if theirs is not None and ours is not None and abs(ours - theirs) > limit * abs(theirs):
            yield f"{name} at step 1: {theirs:.4f} and {ours:.4f}"


def summarize(
    arms: Sequence[Arm],
    measured: dict[str, Metrics | None],
    overrides: Sequence[str],
    failed: dict[str, int],
) -> dict[str, Any]:
    """The result of a comparison, finished or not, JSON-able.

    Args:
      arms: from `make_arms`; the first is the reference.
      measured: the `metrics()` of each, by name.
      overrides: options that every arm got.
      failed: name -> exit code of the runs that cannot go on; the verdict on theirs is "fail".
    """
    reference = arms[0]
    references = {arm.seed: arm for arm in reversed(arms) if arm.stem == reference.stem}
    rows = []
    for arm in arms:
        metrics, other = measured[arm.name], references[arm.seed]
        if arm.stem == reference.stem:
            other = reference
        row: dict[str, Any] = {
            "name": arm.name,
            "config": arm.arguments[1],
            "seed": arm.seed,
            "differs_in": {n: [a, b] for n, a, b in differences(reference.config, arm.config)},
            "is_complete": arm.is_complete(metrics),
            "versions": _versions(arm.directory),
            **(describe_run(metrics) if metrics else {}),
        }
        if arm is not reference:
            row |= {"compared_with": other.name} | pair_gaps(metrics, measured[other.name])
        if arm.name in failed:
            row |= {"exit_code": failed[arm.name]}
        rows.append(row)
    stems = list(dict.fromkeys(arm.stem for arm in arms[1:] if arm.stem != reference.stem))
    compared = [_compare(stem, arms, measured, failed) for stem in stems]
    return {
        "verdict": overall([row["verdict"] for row in compared]),
        "tolerance_relative": TOLERANCE,
        "tolerance_nats": TOLERANCE_NATS,
        "reference": reference.name,
        "overrides": list(overrides),
        "comparisons": compared,
        "arms": rows,
    }


def _compare(
    stem: str,
    arms: Sequence[Arm],
    measured: dict[str, Metrics | None],
    failed: dict[str, int],
) -> dict[str, Any]:
    """The verdict on all the runs of one config."""
    first = arms[0]
    references = [arm for arm in arms if arm.stem == first.stem and not arm.is_repeat]
    repeats = [first] + [arm for arm in arms if arm.is_repeat]
    own = [arm for arm in arms if arm.stem == stem]
    pairs = [
        (run, reference)
        for arm in own
        for other in references
        if other.seed == arm.seed
        and (run := measured[arm.name]) is not None
        and (reference := measured[other.name]) is not None
    ]
    result = judge(
        pairs,
        seeds=[m for arm in references if (m := measured[arm.name]) is not None],
        repeats=[m for arm in repeats if (m := measured[arm.name]) is not None],
        is_complete=all(a.is_complete(measured[a.name]) for a in (*own, *references, *repeats)),
    )
    broken = [arm.name for arm in (*own, *references, *repeats) if arm.name in failed]
    if broken:
        reason = f"{', '.join(broken)}: ended with exit code {failed[broken[0]]}"
        result |= {"verdict": "fail", "reason": reason}
    return {"name": stem, "seeds": [arm.seed for arm in own], **result}


def format_result(result: dict[str, Any]) -> Iterator[str]:
    """The lines of a result for people."""
    yield (
        f"mean gaps to {result['reference']} with the same seeds, +- 90 % interval; passes up to"
        f" {result['tolerance_relative']:.2%} or {result['tolerance_nats']} nats, if the noise is"
        " no larger"
    )
    for row in result["arms"][1:]:
        if row["config"] == result["arms"][0]["config"]:
            yield f"  {row['name']}, beside {row['compared_with']}: {_format_gaps(row)}"
    for row in result["comparisons"]:
        seeds = ", ".join(map(str, row["seeds"]))
        yield f"  {row['name']} (seeds {seeds}): {_format_gaps(row)}"
        yield f"    {row['verdict']}: {row['reason']}"
    yield f"verdict: {result['verdict']}"


def _format_gaps(row: dict[str, Any]) -> str:
    texts = []
    for name in ("train", "validation"):
        gap = row.get(f"{name}_gap")
        if gap is None:
            texts.append(f"{name} -")
            continue
        noise = gap.get("noise_relative")
        band = "" if noise is None else f" +- {noise:.3%}"
        texts.append(
            f"{name} {gap['loss_nats']:.4f} ({gap['relative']:+.3%}{band}, {gap['nats']:+.4f} nats)"
        )
    return "; ".join(texts)


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
