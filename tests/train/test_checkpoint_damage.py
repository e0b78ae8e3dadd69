"""A hundred random kinds of damage: never a wrong resume, always the newest whole checkpoint."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import DATA, assert_bitwise_equal, files, make_state, restore, save

from train.checkpoint import CheckpointError

STEPS = (1, 2, 3)
CASES = 100


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    save(directory, STEPS)
    return directory


def some_file(folder: Path, random: np.random.Generator) -> Path:
    candidates = [path for path in files(folder) if path.stat().st_size]
    return candidates[random.integers(len(candidates))]


def truncate(folder, random):
    path = some_file(folder, random)
    os.truncate(path, random.integers(path.stat().st_size))


def flip_bits(folder, random):
    path = some_file(folder, random)
    content = bytearray(path.read_bytes())
    for _ in range(random.integers(1, 4)):
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)


def zero_a_block(folder, random):
    path = some_file(folder, random)
    content = bytearray(path.read_bytes())
    start = random.integers(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def append(folder, random):
    with some_file(folder, random).open("ab") as file:
        file.write(random.bytes(random.integers(1, 100)))


def delete(folder, random):
    some_file(folder, random).unlink()


def delete_folder(folder, random):
    shutil.rmtree(some_file(folder, random).parent)


def add(folder, random):
    (some_file(folder, random).parent / f"{random.integers(1000)}.new").write_text("?")


def take_file_of_another(folder, random):
    path = some_file(folder, random)
    other = folder.parent / str(STEPS[random.integers(len(STEPS))]) / path.relative_to(folder)
    if other.is_file() and path.exists() and other != path:
        path.write_bytes(other.read_bytes())


def take_place_of_another(folder, random):
    newer = folder.with_name(str(random.integers(4, 9)))
    shutil.rmtree(newer, ignore_errors=True)
    shutil.copytree(folder, newer)


def link_outside(folder, random):
    path = some_file(folder, random)
    target = folder.parent.parent / f"outside_{path.name}"
    path.rename(target)
    path.symlink_to(target)


KINDS = (
    *(truncate, truncate, truncate, flip_bits, flip_bits, flip_bits, zero_a_block, append),
    *(delete, delete_folder, add, take_file_of_another, take_place_of_another, link_outside),
)


def contents(folder: Path) -> dict[str, object]:
    """Everything that counts, links as what they are."""
    return {
        path.relative_to(folder).as_posix(): "link" if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }


@pytest.mark.parametrize("block", range(4))
def test_newest_whole_checkpoint_or_a_refusal(block, pristine, tmp_path):
    whole = {step: contents(pristine / str(step)) for step in STEPS}
    resumed = []
    for seed in range(block * CASES // 4, (block + 1) * CASES // 4):
        random = np.random.default_rng(seed)
        directory = Path(shutil.copytree(pristine, tmp_path / str(seed) / "checkpoints"))
        # The newest is damaged most often; one, two or all three of them.
        for _ in range(random.integers(1, 4)):
            folder = directory / str(random.choice(STEPS, p=(0.2, 0.3, 0.5)))
            if folder.exists() and any(path.stat().st_size for path in files(folder)):
                KINDS[random.integers(len(KINDS))](folder, random)
        good = [step for step in STEPS if contents(directory / str(step)) == whole[step]]
        reports: list[str] = []
        if good:
            restored = restore(directory, reports=reports)
            assert restored is not None and restored.step == good[-1], (seed, reports)
            assert restored.data_state == {**DATA, "step": good[-1]}
            assert_bitwise_equal(restored.state, make_state(good[-1]))
        else:
            with pytest.raises(CheckpointError, match="and none is good"):
                restore(directory, reports=reports)
        names = [path.name for path in directory.iterdir() if path.is_dir()]
        passed_over = [name for name in names if int(name) > (good or [0])[-1]]
        assert len(reports) == len(passed_over), (seed, reports)
        resumed.append(good[-1] if good else 0)
        shutil.rmtree(tmp_path / str(seed))
    assert len(set(resumed)) >= 3  # not always the same outcome
