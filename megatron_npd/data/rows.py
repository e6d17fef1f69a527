"""Rows of a data set, streamed in batches: JSON Lines, parquet, a Hugging Face data set on disk or named `hf://...`.

A batch crosses to another process as bytes and is decoded there (`RowBatch.rows`). JSON Lines are what jsonlines.org
says: UTF-8, and only "\\n" ends a line. A field that is null is a field that is not there, as in a table.

Parquet and data sets need the package `datasets` (extra `data`), which brings pyarrow.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from megatron_npd.errors import UserError

HUB = "hf://"
Row = dict[str, Any]


class RowBatch(Protocol):
    """Some successive rows, as cheap to hand to another process as they are."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Rows by number, counted from 1 as people find them in the file. Raises UserError at one that is broken."""

    def __len__(self) -> int:
        """Rows, blank lines included."""


class Rows(Protocol):
    """A data set that can be read again and again."""

    kind: str
    """What a row's number counts: `line` or `row`."""
    columns: list[str] | None
    """Names of the columns; None where each row has its own."""

    def batches(self, size: int) -> Iterator[RowBatch]:
        """All rows in order, at most `size` at a time."""


def open_rows(path: str, *, trust_code: bool = False) -> Rows:
    """Open a data set.

    Args:
        path: a parquet file or a folder of them; a folder that `Dataset.save_to_disk` wrote; the name of a data set on
            the hub, `hf://OWNER/NAME?config=...&split=train&revision=...`; any other file is JSON Lines.
        trust_code: a data set may bring code that builds it.

    Raises:
        UserError: it is not there, cannot be read, or needs a package that is not installed.
    """
    if path.startswith(HUB):
        return _TableRows(path, _from_hub(path, trust_code))
    place = Path(path)
    if place.is_dir():
        return _open_folder(path, place)
    if place.suffix == ".parquet":
        return _ParquetRows(path, [place])
    return _JsonLines(path)


def place_of(path: str, kind: str, number: int) -> str:
    """How messages name a row."""
    return f"{path}:{number}" if kind == "line" else f"{path}: row {number}"


@dataclass(frozen=True)
class _Lines:
    path: str
    first: int
    lines: list[bytes]

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self) -> Iterator[tuple[int, Row]]:
        for number, line in enumerate(self.lines, self.first):
            if line.strip():
                yield number, _json_object(place_of(self.path, "line", number), line)


class _JsonLines:
    kind = "line"
    columns = None

    def __init__(self, path: str):
        self._path = path
        with self._open():
            pass

    def batches(self, size: int) -> Iterator[RowBatch]:
        with self._open() as file:
            first = 1
            while lines := list(islice(file, size)):
                if first == 1:
                    lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
                yield _Lines(self._path, first, lines)
                first += len(lines)

    def _open(self) -> Any:
        try:
            return open(self._path, "rb")  # iterating over bytes, "\n" alone ends a line
        except OSError as error:
            raise UserError(f"{self._path}: cannot read prompts: {error.strerror}") from None


def _json_object(place: str, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not utf-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{place}: not JSON ({what})") from None
    except RecursionError:
        raise UserError(f"{place}: not JSON that can be read (nested too deep)") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: must be a JSON object")
    return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True)
class _Table:
    """Rows of an Arrow table, as an IPC stream: a slice that is pickled would take the whole table along."""

    path: str
    first: int
    length: int
    stream: bytes

    def __len__(self) -> int:
        return self.length

    def rows(self) -> Iterator[tuple[int, Row]]:
        import pyarrow

        with pyarrow.ipc.open_stream(self.stream) as reader:
            table = reader.read_all()
        for number, row in enumerate(table.to_pylist(), self.first):
            yield number, _without_null(row)


class _ParquetRows:
    kind = "row"

    def __init__(self, path: str, files: list[Path]):
        self._path, self._files = path, files
        self.columns: list[str] = list(_parquet(path, files[0]).schema_arrow.names)
        for file in files[1:]:
            if (found := _parquet(path, file).schema_arrow.names) != self.columns:
                raise UserError(f"{file}: has columns {', '.join(found)}; must be those of {files[0].name}")

    def batches(self, size: int) -> Iterator[RowBatch]:
        import pyarrow

        first = 1
        for file in self._files:
            try:
                for batch in _parquet(self._path, file).iter_batches(size):
                    yield _table_batch(self._path, first, pyarrow.Table.from_batches([batch]))
                    first += len(batch)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file}: damaged after row {first - 1}: {_reason(error)}") from None


class _TableRows:
    """A `datasets.Dataset`."""

    kind = "row"

    def __init__(self, path: str, dataset: Any):
        self._path, self._dataset = path, dataset
        self.columns: list[str] = list(dataset.column_names)
        self.fingerprint = str(dataset._fingerprint)
        """What `datasets` itself tells versions of a data set apart by."""

    def batches(self, size: int) -> Iterator[RowBatch]:
        import pyarrow

        first = 1
        try:
            for table in self._dataset.with_format("arrow").iter(batch_size=size):
                yield _table_batch(self._path, first, table)
                first += len(table)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self._path}: damaged after row {first - 1}: {_reason(error)}") from None


def _table_batch(path: str, first: int, table: Any) -> _Table:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return _Table(path, first, len(table), sink.getvalue().to_pybytes())


def _open_folder(path: str, folder: Path) -> Rows:
    if (folder / "state.json").is_file():
        return _TableRows(path, _saved_dataset(path))
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file()))
        raise UserError(f"{path}: holds several data sets; name the folder of one of them: {splits}")
    if files := sorted(folder.glob("*.parquet")):
        return _ParquetRows(path, files)
    code = sorted(folder.glob("*.py"))
    rule = "must hold parquet files, or a data set written by save_to_disk"
    raise UserError(f"{path}: " + (f"needs its code ({code[0].name}) to load; {rule}" if code else f"a folder; {rule}"))


def _parquet(path: str, file: Path) -> Any:
    _require_datasets(path)
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({_reason(error)})") from None


def _saved_dataset(path: str) -> Any:
    datasets = _require_datasets(path)
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # whatever a damaged folder makes it raise
        raise UserError(f"{path}: cannot be read as a saved data set: {_reason(error)}") from None


def _from_hub(path: str, trust_code: bool) -> Any:
    parts = urlsplit(path)
    name = (parts.netloc + parts.path).removeprefix("datasets/").strip("/")
    options = {key: values[-1] for key, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
    if name.count("/") != 1 or options.keys() - {"config", "split", "revision"}:
        raise UserError(f"{path}: must have the form {HUB}OWNER/NAME?config=...&split=...&revision=...")
    datasets = _require_datasets(path)
    code = {"trust_remote_code": True} if trust_code and int(datasets.__version__.split(".")[0]) < 4 else {}
    try:
        return datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "train"), revision=options.get("revision"), **code
        )
    except Exception as error:  # network, hub, builder: anything may come out of it
        if "script" in str(error) or "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: needs code of its own to load, which is not run; use a data set of plain files, or save it "
                f"with save_to_disk elsewhere and name the folder ({_reason(error)})"
            ) from None
        raise UserError(f"{path}: cannot be loaded from the hub: {_reason(error)}") from None


def _require_datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: needs the Python package datasets, which is not installed ({error}); pip install datasets"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _without_null(value: Any) -> Any:
    """A table gives every row all fields of a struct; those that a row does not have are null."""
    if isinstance(value, dict):
        return {name: _without_null(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_null(entry) for entry in value]
    return value


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
