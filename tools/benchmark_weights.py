"""Speed and memory of everything that moves weights, on made-up checkpoints of real shapes.

    python tools/benchmark_weights.py convert --shape 7b --folder SCRATCH [--json FILE]

convert   Hugging Face to Megatron torch_dist and back, each beside a plain copy (sendfile and fsync) of the same files:
          seconds, megabytes a second, ratio to the copy, peak anonymous memory. Before each of them the files to read
          are dropped from the page cache. What comes back must be the same files, byte for byte.

The checkpoint is written below SCRATCH, which needs twice its size, and deleted in the end. Exit status: 0; 1
what came back differs; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_npd.conversion.progress_bar import Report
from megatron_npd.conversion.to_hugging_face import to_hugging_face
from megatron_npd.conversion.to_megatron import to_megatron
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.files import write_json
from megatron_npd.mcore.model_parallel import initialize, shutdown
from megatron_npd.mcore.torch_dist import checkpoint_layout
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.process.memory import reuse_freed_memory
from megatron_npd.versions.manifest import sha256
from megatron_npd.weights.safetensors_writer import TensorSpec, plan_files, write_file, write_index
from megatron_npd.weights.source import groups_of, hugging_face_shapes

_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6}


def _qwen2(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict:
    return _QWEN2 | {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    # 150M parameters of which the embedding is a small part: what does not stream shows in its memory.
    "small": _qwen2(4096, 1024, 4096, 10, 8, 8, True),
    "1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, True),
    "7b": _qwen2(152064, 3584, 18944, 28, 28, 4, False),
    "72b": _qwen2(152064, 8192, 29568, 80, 64, 8, False),
}
"""config.json of Qwen2.5 in its sizes."""
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Beside:
    """One direction of a conversion, and the copy it is measured against."""

    conversion: Report
    copy_seconds: float
    copied_bytes: int

    @property
    def ratio(self) -> float:
        """Throughput of the conversion by that of the copy; 1.0 would be as fast as copying."""
        return (self.conversion.nbytes / self.conversion.seconds) / (self.copied_bytes / self.copy_seconds)


def main(argv: list[str] | None = None) -> int:
    """Run one measurement and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if not arguments.folder.is_dir():
            raise UserError(f"--folder {arguments.folder}: no such folder")
        torch.set_num_threads(arguments.threads)
        with tempfile.TemporaryDirectory(prefix="benchmark_weights_", dir=arguments.folder) as scratch:
            return arguments.measurement(arguments, Path(scratch))
    except UserError as error:
        print(f"benchmark_weights: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS


def convert(arguments: argparse.Namespace, scratch: Path) -> int:
    """Both directions of a conversion."""
    reuse_freed_memory()
    original, megatron, back = scratch / "original", scratch / "megatron", scratch / "back"
    parallel = initialize()
    try:
        make_checkpoint(original, arguments.shape, getattr(torch, arguments.dtype), parallel)
        hashes = {file.name: sha256(file) for file in original.glob("*.safetensors")}
        there = _beside_copy(original, scratch, lambda: to_megatron(original, megatron, parallel))
        shutil.rmtree(original)
        again = _beside_copy(
            megatron, scratch, lambda: to_hugging_face(megatron, back, parallel, max_shard_bytes=SHARD_BYTES)
        )
    finally:
        shutdown()
    report = {"shape": arguments.shape, "dtype": arguments.dtype, "threads": arguments.threads}
    for direction, measured in (("hf-to-megatron", there), ("megatron-to-hf", again)):
        copied = f"copy {measured.copied_bytes / 1e6 / measured.copy_seconds:.0f} MB/s, ratio {measured.ratio:.2f}"
        print(f"{direction}: {measured.conversion}; {copied}")
        report[direction] = asdict(measured) | {"ratio_to_copy": measured.ratio}
    if arguments.json:
        write_json(arguments.json, report)
    if {file.name: sha256(file) for file in back.glob("*.safetensors")} != hashes:
        print("benchmark_weights: what came back differs from the original", file=sys.stderr)
        return 1
    print(f"{len(hashes)} files came back byte for byte")
    return 0


def make_checkpoint(folder: Path, shape: str, dtype: torch.dtype, parallel: Parallel) -> None:
    """Write a Hugging Face checkpoint of random finite weights: one random block, read from another place for each
    tensor."""
    folder.mkdir()
    write_json(folder / "config.json", SHAPES[shape] | {"dtype": str(dtype).removeprefix("torch.")})
    dims = read_model_dims(folder)
    places = checkpoint_layout(dims, parallel).places
    shapes = hugging_face_shapes({name: places[name].shape for group in groups_of(dims) for name in group}, dims)
    specs = [TensorSpec(name, shape, dtype) for tensors in shapes.values() for name, shape in tensors.items()]
    needed, free = int(2.1 * sum(spec.nbytes for spec in specs)), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder.parent}: {free / 1e9:.1f} GB free; must be at least {needed / 1e9:.1f} GB")
    places_to_begin, largest = 2**20, max(spec.nbytes for spec in specs) // dtype.itemsize
    # Without its highest exponent bit a number is below 2.
    words = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    highest = torch.iinfo(words).max // 2 + 1
    block = torch.randint(0, torch.iinfo(words).max, (largest + places_to_begin,), dtype=words)
    block.bitwise_and_(~highest)
    by_name = {spec.name: spec for spec in specs}

    def tensor(name: str) -> torch.Tensor:
        spec, begin = by_name[name], zlib.crc32(name.encode()) % places_to_begin
        return block[begin : begin + spec.nbytes // dtype.itemsize].view(dtype).view(spec.shape)

    shards = plan_files(specs, SHARD_BYTES)
    for shard in shards:
        write_file(folder, shard, tensor)
    write_index(folder, shards)


def _beside_copy(source: Path, scratch: Path, conversion: Callable[[], Report]) -> Beside:
    """Time a plain copy of a folder's files, then its conversion."""
    files = [file for file in source.iterdir() if file.is_file()]
    copies = scratch / "copy"
    copies.mkdir()
    _drop_from_page_cache(files)
    started = time.monotonic()
    for file in files:
        shutil.copyfile(file, copies / file.name)
        with open(copies / file.name, "rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(copies)
    _drop_from_page_cache(files)
    return Beside(conversion(), seconds, sum(file.stat().st_size for file in files))


def _drop_from_page_cache(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--shape", choices=SHAPES, default="7b")
    common.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    common.add_argument("--folder", type=Path, required=True, metavar="SCRATCH", help="where to write and delete")
    common.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    for name, measurement in {"convert": convert}.items():
        measurements.add_parser(name, parents=[common]).set_defaults(measurement=measurement)
    return parser


if __name__ == "__main__":
    sys.exit(main())
