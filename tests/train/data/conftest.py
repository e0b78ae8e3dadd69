"""Small configs and hand-made shards for the tests of the input pipeline."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from train.config import DataConfig, Fp8Config, LogConfig, ModelConfig, RunConfig, TrainConfig


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config of `data` options; no validation split unless `validation_fraction` is given."""

    def make(*, vocab_size: int = 300, seed: int = 0, **data: object) -> TrainConfig:
        data.setdefault("validation_fraction", 0.0)
        data.setdefault("cache_directory", str(tmp_path / "cache"))
        data.setdefault("sequence_length", 4)
        data.setdefault("batch_size", 2)
        return TrainConfig(
            run=RunConfig(seed=seed),
            model=ModelConfig(vocab_size=vocab_size),
            fp8=Fp8Config(recipe="bf16"),
            data=DataConfig(**data),
            log=LogConfig(validate_every=100 if data["validation_fraction"] else 0),
        )

    return make


@pytest.fixture
def write_tokenizer() -> Callable[..., Path]:
    """Writes a tokenizer whose words are "t1", "t2", ...; the word "t<i>" has id i."""

    def write(path: Path, vocab_size: int, end_of_text: str = "<|endoftext|>", end_id: int = 0):
        vocab = {f"t{i}": i for i in range(vocab_size) if i != end_id} | {end_of_text: end_id}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([end_of_text])
        tokenizer.save(str(path))
        return path

    return write


@pytest.fixture
def write_shard(tmp_path: Path, write_tokenizer) -> Callable[..., Path]:
    """Writes ids as a shard, with meta.json and tokenizer.json beside it; returns the folder."""

    def write(
        ids: list[int] | np.ndarray,
        *,
        name: str = "shard.bin",
        dtype: str = "uint16",
        end_of_text_id: int = 0,
        vocab_size: int = 100,
    ) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(np.asarray(ids, np.dtype(dtype).newbyteorder("<")).tobytes())
        meta = {"dtype": dtype, "end_of_text_id": end_of_text_id, "vocab_size": vocab_size}
        (folder / "meta.json").write_text(json.dumps(meta))
        write_tokenizer(folder / "tokenizer.json", vocab_size)
        return folder

    return write
