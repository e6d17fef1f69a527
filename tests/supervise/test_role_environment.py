"""What roles find in their environment, on CPUs and on GPUs; what the user set stands."""

from __future__ import annotations

import pytest
from small_config import make_config

from megatron_npd.roles import ANNOTATOR, ROLLOUT, TRAINER
from megatron_npd.supervise import role_work
from megatron_npd.supervise.role_work import role_environment

CUDA = ("PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
DETERMINISTIC = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_work, "device_here", lambda: "gpu")
    for name in (*CUDA, *DETERMINISTIC, "PYTORCH_CUDA_ALLOC_CONF", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)


def found(role: str, *names: str, **sections: object) -> list[str | None]:
    environment = role_environment(make_config(**sections), role)
    return [environment.get(name) for name in names]


def test_a_cpu_needs_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_work, "device_here", lambda: "cpu")
    for role in (TRAINER, ANNOTATOR, ROLLOUT):
        split = {"tensor_model_parallel_size": 2}
        assert found(role, *CUDA, *DETERMINISTIC, deterministic=True, training=split) == [None] * 5


@pytest.mark.usefixtures("on_gpus")
def test_megatron_gets_one_queue_where_layers_are_split() -> None:
    split = {"tensor_model_parallel_size": 2}
    assert found(TRAINER, *CUDA, training=split) == ["expandable_segments:True", "1"]
    assert found(TRAINER, *CUDA) == ["expandable_segments:True", None]
    assert found(ANNOTATOR, *CUDA, annotator={"pack_length": 4096} | split) == ["expandable_segments:True", "1"]
    assert found(ROLLOUT, *CUDA, rollout=split) == [None, None], "vLLM chooses for itself"


@pytest.mark.usefixtures("on_gpus")
def test_deterministic_is_said_to_every_library() -> None:
    for role in (TRAINER, ANNOTATOR):
        assert found(role, *DETERMINISTIC) == [None] * 3
        assert found(role, *DETERMINISTIC, deterministic=True) == ["0", ":4096:8", "Ring"]
    assert found(ROLLOUT, "VLLM_BATCH_INVARIANT") == [None]
    assert found(ROLLOUT, "VLLM_BATCH_INVARIANT", deterministic=True) == ["1"]


@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_set_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert found(TRAINER, "PYTORCH_ALLOC_CONF") == [None]
