"""Is a converted checkpoint the same model? Every tensor bit by bit, then logits of both sides' own implementations.

Legend: T tokens of all prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_npd.config import PromptsConfig
from megatron_npd.conversion.to_hugging_face import StoredModel
from megatron_npd.data.prompt_rows import read_prompts
from megatron_npd.data.tokenizer import load_tokenizer
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.mcore.checkpoint import load_model_only
from megatron_npd.mcore.model import ModelOptions, build_gpt, forward_packed, projected
from megatron_npd.mcore.torch_dist import TorchDistReader, checkpoint_layout
from megatron_npd.models.hf_checkpoint import tensor_files
from megatron_npd.models.hf_config import ModelDims, read_model_dims
from megatron_npd.weights.tensor_file import stored_tensors

TOLERANCE = 1e-5
"""Of the largest difference between logits, by the largest logit. Both sides compute in float32, from the very same
weights: those of a 16-bit checkpoint are widened, which is exact. So one tolerance holds for every data type."""
CHUNK_TOKENS = 1024
_LENGTHS = (5, 16, 33)

Prompts = Sequence[Sequence[int]]


class MismatchError(Exception):
    """The two sides are not the same model; the text is one line."""


def compare_tensors(
    folder: Path, checkpoint: Path, dims: ModelDims, parallel: Parallel, written: str
) -> dict[str, torch.dtype]:
    """Compare every tensor of a Hugging Face `folder` with a torch_dist `checkpoint`, one at a time.

    `written`: "hf" or "megatron", the side that was made from the other; both are compared in its data types, which
    are returned by Hugging Face name.

    Raises:
        MismatchError: a tensor differs.
    """
    stored = StoredModel(TorchDistReader(checkpoint), checkpoint_layout(dims, parallel), dims)
    names = list(stored.specs(None))
    stored.will_read(names)
    theirs, dtypes = stored_tensors(tensor_files(folder)), {}
    for name in names:
        their, our = theirs[name].read(), stored.read(name)
        dtypes[name] = (their if written == "hf" else our).dtype
        if not _same_bits(their.to(dtypes[name]), our.to(dtypes[name])):
            raise MismatchError(f"{name} differs between {folder} and {checkpoint}")
    return dtypes


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that also holds for NaN."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def compare_logits(
    folder: Path, checkpoint: Path, dims: ModelDims, parallel: Parallel, dtype: torch.dtype, prompts: Prompts
) -> tuple[float, float] | None:
    """Largest difference between the logits of both sides, and the largest logit; None where transformers does not
    know the architecture. One model is in memory at a time, in float32.

    `dtype`: of the weights on both sides (rounded to it first, where they are wider).

    Raises:
        MismatchError: they differ by more than TOLERANCE.
    """
    if not known_to_transformers(folder):
        return None
    theirs_TV = hugging_face_logits(folder, dtype, prompts)
    ours_TV = megatron_logits(checkpoint, dims, parallel, dtype, prompts)
    largest = float(theirs_TV.abs().max())
    difference = float((ours_TV - theirs_TV).abs().max())
    if not difference <= TOLERANCE * largest:
        raise MismatchError(
            f"logits of {folder} and {checkpoint} differ by up to {difference:.2e}; "
            f"must not exceed {TOLERANCE:.0e} of the largest, {largest:.2f}"
        )
    return difference, largest


def known_to_transformers(folder: Path) -> bool:
    """Whether transformers can build the model without code from the checkpoint."""
    # Of models, not of configurations: the rollout side registers one of openPangu's, without a model.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return read_json(folder / "config.json").get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@torch.no_grad()
def hugging_face_logits(folder: Path, dtype: torch.dtype, prompts: Prompts) -> torch.Tensor:
    """float32 [T, V] of transformers, one prompt at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    model = model.float().eval()
    return torch.cat([model(torch.tensor([list(ids)])).logits[0] for ids in prompts])


@torch.no_grad()
def megatron_logits(
    checkpoint: Path, dims: ModelDims, parallel: Parallel, dtype: torch.dtype, prompts: Prompts
) -> torch.Tensor:
    """float32 [T, V] of the model that trains here, all prompts packed."""
    [model] = build_gpt(dims, parallel, dtype, ModelOptions("reference"))
    load_model_only(checkpoint, [model])
    model = model.float().eval()
    model.config.params_dtype = torch.float32
    lengths = [len(ids) for ids in prompts]
    tokens_T = torch.tensor([token for ids in prompts for token in ids], device=parallel.device)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    every_row = torch.arange(len(tokens_T), device=parallel.device)
    hidden = forward_packed(model, tokens_T, cu_seqlens, every_row, parallel)
    return torch.cat([logits[:, : dims.vocab_size].cpu() for _, logits in projected(model, hidden, CHUNK_TOKENS)])


def prompts_from(argument: str, folder: Path) -> Prompts:
    """Token ids to compare logits on.

    `argument`: empty for a few fixed sequences; a JSON-lines file of chats, for which `folder` has a tokenizer; or the
    ids themselves, such as 1,15,7;3,4.

    Raises:
        UserError: none of these, or an id beyond the vocabulary.
    """
    dims = read_model_dims(folder)
    if not argument:
        return [[(7919 * (i + 1) * length) % dims.vocab_size for i in range(length)] for length in _LENGTHS]
    if argument.endswith(".jsonl"):
        return _tokenised(argument, folder)
    try:
        prompts = [[int(token) for token in sequence.split(",")] for sequence in argument.split(";")]
    except ValueError:
        raise UserError(f"--verify {argument}: must be a .jsonl file, or token ids such as 1,15,7;3,4") from None
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < dims.vocab_size:
            raise UserError(f"--verify: token id {token}: must be from 0 to {dims.vocab_size - 1}")
    return prompts


def _tokenised(path: str, folder: Path) -> Prompts:
    chats = [prompt.messages for prompt in read_prompts(path, PromptsConfig(train=path, heldout=path))]
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    try:
        return tokenizer.chat_ids(chats)
    except Exception as error:  # whatever a chat template raises
        raise UserError(f"{folder}: its tokenizer cannot be used on {path}: {error}") from None
