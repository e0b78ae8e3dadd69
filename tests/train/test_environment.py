"""What is set before JAX starts, and that a run on a GPU keeps what it compiled."""

import jax
import pytest
from run_cases import make_arguments, write_text

from train import environment, loop
from train.main import main


class _Reached(Exception):
    """The loop came to the call under test."""


def test_options_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_dump_to=x")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    environment.prepare_environment()
    assert environment.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    flags = environment.os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_gpu_enable_triton_gemm=true", "--xla_dump_to=x"]
    assert set(flags[2:]) == {f for f in environment.XLA_FLAGS if "triton" not in f}


def test_a_run_keeps_its_compiled_programs_before_it_compiles_any(tmp_path, monkeypatch):
    # Otherwise a resumed run on a GPU autotunes anew, and may round otherwise.
    directories = []

    def keep(directory):
        directories.append(directory)
        raise _Reached

    def compile_steps(*args, **kwargs):
        raise AssertionError("compiled too early")

    monkeypatch.setattr(loop, "keep_compiled_programs", keep)
    monkeypatch.setattr(loop, "compile_steps", compile_steps)
    with pytest.raises(_Reached):
        main(make_arguments(tmp_path / "run", write_text(tmp_path / "text")))
    assert directories == [tmp_path / "run" / "compiled"]


def test_programs_are_kept_where_the_user_says(tmp_path, monkeypatch):
    set_to = {}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    environment.keep_compiled_programs(tmp_path / "run")
    assert "jax_compilation_cache_dir" not in set_to
    assert set_to["jax_persistent_cache_min_compile_time_secs"] == 0.0


@pytest.mark.parametrize(("backend", "is_kept"), [("gpu", True), ("cpu", False)])
def test_programs_are_kept_for_a_gpu_alone(backend, is_kept, tmp_path, monkeypatch):
    set_to = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    environment.keep_compiled_programs(tmp_path)
    directory = set_to.get("jax_compilation_cache_dir")
    assert directory == (str(tmp_path) if is_kept else None)
    # Whatever its size and however quick: all programs are kept.
    assert set_to.get("jax_persistent_cache_min_compile_time_secs") == (0.0 if is_kept else None)
