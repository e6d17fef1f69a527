"""Convert checkpoints between Hugging Face and Megatron torch_dist, with one layer in memory at a time.

    python tools/convert_checkpoint.py hf-to-megatron --input HF_DIR --output DIR
    python tools/convert_checkpoint.py megatron-to-hf --input DIR --output HF_DIR

DIR is a checkpoint that any tensor and pipeline parallel size can load; its folder `hf` carries configuration and
tokenizer along. `megatron-to-hf` also takes what a trainer left: `checkpoints/iter_0000120`, or `checkpoints` for the
current one; its configuration and tokenizer then come from --template, a Hugging Face folder of the same model.

The output appears when it is complete. A conversion that was killed goes on where it was when the same command is given
again. Exit status: 0 done; 1 --verify found a difference; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.process.memory import reuse_freed_memory

if TYPE_CHECKING:
    import torch

    from megatron_npd.distributed.parallel import Parallel

DTYPES = ("auto", "float32", "bfloat16", "float16")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except UserError as error:
        return _say(str(error), USAGE_STATUS)
    except OSError as error:
        return _say(f"{error.filename or arguments.output}: {error.strerror or error}", USAGE_STATUS)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from here", 130)


def _run(arguments: argparse.Namespace) -> int:
    """Convert, and verify where that was asked for."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: must be 1; a single process converts")
    max_shard_bytes = _bytes(arguments.max_shard_size) if "max_shard_size" in arguments else 0
    # Megatron takes seconds to import: not for --help and not for a wrong option.
    import torch

    from megatron_npd.conversion.to_hugging_face import to_hugging_face
    from megatron_npd.conversion.to_megatron import to_megatron
    from megatron_npd.mcore.model_parallel import initialize, shutdown

    source, output = arguments.input, arguments.output
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    parallel = initialize()
    try:
        if arguments.direction == "hf-to-megatron":
            report = to_megatron(source, output, parallel, dtype, arguments.overwrite)
        else:
            report = to_hugging_face(
                source, output, parallel, arguments.template, dtype, max_shard_bytes, arguments.overwrite
            )
        print(f"{output}: {report}")
        return 0 if arguments.verify is None else _verify(arguments, parallel)
    finally:
        shutdown()


def _verify(arguments: argparse.Namespace, parallel: Parallel) -> int:
    from megatron_npd.conversion.verify import (
        TOLERANCE,
        MismatchError,
        compare_logits,
        compare_tensors,
        prompts_from,
    )
    from megatron_npd.mcore.torch_dist import find_checkpoint
    from megatron_npd.models.hf_config import read_model_dims

    to_megatron = arguments.direction == "hf-to-megatron"
    folder, checkpoint = arguments.input, arguments.output
    if not to_megatron:
        folder, checkpoint = arguments.output, find_checkpoint(arguments.input)
    dims = read_model_dims(folder)
    try:
        dtypes = compare_tensors(folder, checkpoint, dims, parallel, written="megatron" if to_megatron else "hf")
        print(f"verify: {len(dtypes)} tensors are equal bit by bit")
        if arguments.verify == "tensors":
            return 0
        prompts = prompts_from(arguments.verify, folder)
        found = compare_logits(folder, checkpoint, dims, parallel, _narrowest(dtypes), prompts)
    except MismatchError as error:
        return _say(str(error), 1)
    if found is None:
        print(f"verify: transformers does not know the architecture of {folder}, so logits were not compared")
    else:
        difference, largest = found
        print(
            f"verify: logits at {sum(map(len, prompts))} positions differ by at most {difference:.2e}, "
            f"{difference / largest:.1e} of the largest ({largest:.2f}); limit {TOLERANCE:.0e}"
        )
    return 0


def _narrowest(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    return min(dtypes.values(), key=lambda dtype: dtype.itemsize)


def _bytes(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|)", text.strip())
    size = int(float(found.group(1)) * UNITS[found.group(2)]) if found else 0
    if size <= 0:
        raise UserError(f"--max-shard-size {text}: must be a size such as 5GB, 500MB or 2GiB")
    return size


def _say(text: str, status: int) -> int:
    print(f"convert_checkpoint: error: {' '.join(text.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="direction", required=True, metavar="hf-to-megatron | megatron-to-hf")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", type=Path, required=True, metavar="DIR")
    common.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder to make")
    common.add_argument("--dtype", choices=DTYPES, default="auto", help="of all tensors (default: as they are)")
    common.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    common.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="PROMPTS",
        help="compare all tensors bit by bit, then logits of transformers and of Megatron, in float32, on PROMPTS: a "
        ".jsonl file of chats, or token ids such as 1,15,7;3,4 (default: a few fixed sequences). Needs memory for one "
        "float32 model at a time; `--verify tensors` compares tensors alone and does not",
    )
    commands.add_parser("hf-to-megatron", parents=[common], help="a Hugging Face folder to torch_dist")
    back = commands.add_parser("megatron-to-hf", parents=[common], help="torch_dist to a Hugging Face folder")
    back.add_argument("--template", type=Path, metavar="HF_DIR", help="where configuration and tokenizer come from")
    back.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file's tensors (default: 5GB)")
    return parser


if __name__ == "__main__":
    reuse_freed_memory()
    sys.exit(main())
