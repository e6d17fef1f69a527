"""Writing a Megatron torch_dist checkpoint group by group, without ever holding more than one group.

Every group of parameters (the embedding, each layer, the head) is written as a rank of a trainer would write its own:
one file, by torch.distributed.checkpoint's own writer, which asks for each tensor when it comes to it. A group that is
durable on disk is noted in a journal, so that a killed conversion goes on with the next.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_npd.files import fsync_folder, write_atomically
from megatron_npd.mcore.checkpoint import write_common
from megatron_npd.mcore.torch_dist import BACKEND, BACKEND_VERSION, CheckpointLayout, Place

JOURNAL = "journal"
CHUNK_BYTES = 16 * 2**20
"""Tensors are stored in pieces of about this many bytes, cut along their rows: a rank that loads reads whole pieces,
and should read little beyond its own shard. (Memory of this size malloc reuses; of more than 32 MB it does not.)"""


class TorchDistWriter:
    """Writes the groups of one checkpoint, in any order and over any number of processes' lives."""

    def __init__(
        self,
        folder: Path,
        layout: CheckpointLayout,
        groups: Sequence[Sequence[str]],
        dtypes: Mapping[str, torch.dtype],
    ):
        """`groups`: parameter names, every one in one group. `dtypes`: of each parameter; one and the same for
        parameters that share a key."""
        self._folder = folder
        self._journal = folder / JOURNAL
        self._writer = _Writer(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self._thread, self._unsynced = ThreadPoolExecutor(1, "fsync"), Future[None]()
        self._unsynced.set_result(None)
        self._objects = layout.objects
        self._wanted: dict[MetadataIndex, _Piece] = {}
        plans = [SavePlan(self._items(names, layout, dtypes)) for names in groups]
        plans[0].items.extend(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in layout.objects)
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer.prepare_global_plan(plans)

    def is_written(self, group: int) -> bool:
        """Whether a group is durable, written by this process or one before it."""
        return self._entry(group).is_file()

    def write(self, group: int, parameter: Callable[[str], torch.Tensor]) -> None:
        """Write one group; it is made durable while the next one is written. `parameter` gives a tensor by name, when
        it is needed and once, in the order of the group."""
        planner = _Planner(self._wanted, self._objects, parameter)
        with _without_checksums():
            try:
                results = self._writer.write_data(self._plans[group], planner).wait()
            except RuntimeError as error:
                # torch.save's own complaint that its archive is not finished hides why.
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        self._unsynced.result()
        self._unsynced = self._thread.submit(self._note, group, results)

    def finish(self) -> None:
        """Write the index over all groups, and what makes the folder a checkpoint to Megatron."""
        self._unsynced.result()
        # Read back also what this process wrote: equal strings that are one object would be pickled otherwise.
        entries = [self._entry(group).read_bytes() for group in range(len(self._plans))]
        self._writer.finish(self._metadata, [pickle.loads(entry) for entry in entries])
        write_common(self._folder)
        save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(self._folder))
        shutil.rmtree(self._journal)

    def _note(self, group: int, results: list[WriteResult]) -> None:
        """Make the file of a group durable, then the note that it is."""
        for path in {self._folder / result.storage_data.relative_path for result in results}:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_folder(self._folder)
        write_atomically(self._entry(group), pickle.dumps(results))

    def _entry(self, group: int) -> Path:
        return self._journal / f"group_{group:05d}"

    def _items(
        self, names: Sequence[str], layout: CheckpointLayout, dtypes: Mapping[str, torch.dtype]
    ) -> list[WriteItem]:
        items = []
        for name in names:
            place, properties = layout.places[name], TensorProperties(dtypes[name])
            for piece in _pieces(name, place, properties.dtype):
                index = MetadataIndex(place.key, piece.offset(place))
                self._wanted[index] = piece
                chunk = ChunkStorageMetadata(index.offset, torch.Size(piece.block(place)))
                data = TensorWriteData(chunk, properties, torch.Size(place.stored_shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items


@dataclass(frozen=True)
class _Piece:
    """Some rows of a parameter."""

    name: str
    start: int
    rows: int

    def offset(self, place: Place) -> tuple[int, ...]:
        """Of its first element in the stored tensor."""
        axis = len(place.stored_shape) - len(place.shape)
        return tuple(offset + self.start * (axis == i) for i, offset in enumerate(place.offset))

    def block(self, place: Place) -> tuple[int, ...]:
        """Its shape, with the stored tensor's number of dimensions."""
        axis = len(place.stored_shape) - len(place.shape)
        return (*place.block[:axis], self.rows, *place.shape[1:])


def _pieces(name: str, place: Place, dtype: torch.dtype) -> list[_Piece]:
    total = place.shape[0]
    row_bytes = torch.Size(place.shape[1:]).numel() * dtype.itemsize
    rows = max(1, CHUNK_BYTES // row_bytes)
    return [_Piece(name, start, min(rows, total - start)) for start in range(0, total, rows)]


class _Planner(DefaultSavePlanner):
    """Gives the writer each piece when it is written; the pieces of a parameter come one after another."""

    def __init__(
        self,
        wanted: Mapping[MetadataIndex, _Piece],
        objects: Mapping[str, bytes],
        parameter: Callable[[str], torch.Tensor],
    ):
        super().__init__()
        self._wanted, self._objects, self._parameter = wanted, objects, parameter
        self._name, self._tensor = "", torch.empty(0)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        piece = self._wanted[write_item.index]
        if piece.name != self._name:
            self._tensor = torch.empty(0)  # free the last one before the next is there
            self._name, self._tensor = piece.name, self._parameter(piece.name).contiguous()
        rows = self._tensor[piece.start : piece.start + piece.rows]
        return _with_own_storage(rows).view(write_item.tensor_data.chunk.sizes)


def _with_own_storage(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that is all of its storage: of a part of a storage the writer would make a copy."""
    return torch.from_numpy(rows.view(-1).view(torch.uint8).numpy()).view(rows.dtype)


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save computes CRC-32 sums that torch.load does not look at, and is four times slower for it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Writer(FileSystemWriter):
    """Leaves the path and the random name of this run out of the index: the same input gives the same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()
