"""Writing this model, from any parallel layout, as a complete Hugging Face checkpoint that appears atomically.

Each pipeline stage gathers its parameters over tensor parallelism and its first rank writes one safetensors file; one
rank then writes the index, copies configuration and tokenizer, hashes everything and renames the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_npd.buffer.versions import MANIFEST, PARITY, ParityProbe, read_header, write_manifest
from megatron_npd.hf_config import ModelDims
from megatron_npd.parallel import Parallel
from megatron_npd.run_directory import RunDirectory, fsync_folder, write_json
from megatron_npd.weights.name_map import hugging_face_names, is_tied_copy, rules_for

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth")


def publish_version(
    run: RunDirectory,
    version: int,
    parameters: Mapping[str, torch.Tensor],
    dims: ModelDims,
    parallel: Parallel,
    template: str | Path,
    probe: ParityProbe | None,
    barrier: Callable[[], None],
) -> int:
    """Publish `weights/vN` and return its bytes. Every rank calls this; it returns when the version is visible.

    Args:
        parameters: this rank's, as `mcore.model.named_parameters` gives them.
        template: checkpoint folder whose configuration, tokenizer and generation config are carried along.
        probe: written by the last stage's first rank; None on every other rank.
        barrier: waits for all ranks.

    Raises:
        FileExistsError: the version is published already (versions never change).
    """
    final = run.version(version)
    if final.exists():
        raise FileExistsError(f"{final}: version {version} is already published; versions never change")
    staging = run.weights / f".staging-{final.name}"
    if parallel.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)  # left by a writer that was killed
        staging.mkdir(parents=True)
    barrier()
    if parallel.is_first_replica:
        tensors = dict(gather_hugging_face(parameters, dims, parallel))
        if parallel.tp_rank == 0:
            name = f"model-{parallel.pp_rank + 1:05d}-of-{parallel.pp_size:05d}.safetensors"
            save_file(tensors, staging / name, metadata={"format": "pt"})
    if probe is not None:
        write_json(staging / PARITY, {"sequences": probe.sequences, "logprobs": probe.logprobs})
    barrier()
    if parallel.rank == 0:
        _finish(staging, final, version, Path(template), next(iter(parameters.values())).dtype)
    barrier()
    return sum(file.stat().st_size for file in final.glob("*.safetensors"))


def gather_hugging_face(
    parameters: Mapping[str, torch.Tensor], dims: ModelDims, parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full CPU tensor) of this stage's parameters; a collective over the tensor-parallel group.

    Yields on tensor-parallel rank 0 only; the other ranks take part and yield nothing. A tensor may share memory with
    its parameter.
    """
    rules = rules_for(dims)
    for name, parameter in parameters.items():
        if is_tied_copy(name, dims):
            continue
        shards = _all_shards(parameter.detach(), parallel)
        if parallel.tp_rank == 0:
            rule, layer = rules[name]
            tensors = rule.layout.unshard(shards, dims)
            for hf_name, tensor in zip(hugging_face_names(rule, layer), tensors, strict=True):
                yield hf_name, tensor.cpu().contiguous()


def _all_shards(shard: torch.Tensor, parallel: Parallel) -> list[torch.Tensor]:
    if parallel.tp_group is None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=parallel.tp_group)
    return shards


def _finish(staging: Path, final: Path, version: int, template: Path, dtype: torch.dtype) -> None:
    """Index, configuration, tokenizer, manifest; then make the folder durable and give it its name."""
    weight_map = {name: file.name for file in sorted(staging.glob("*.safetensors")) for name in read_header(file)}
    total = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(staging / "model.safetensors.index.json", index)
    for file in sorted(template.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES) and not (staging / file.name).exists():
            shutil.copyfile(file, staging / file.name)
    (staging / MANIFEST).unlink(missing_ok=True)  # the template may be a published version itself
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(staging / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    write_manifest(staging, version)
    for file in staging.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    fsync_folder(staging)
    os.rename(staging, final)
    fsync_folder(final.parent)
