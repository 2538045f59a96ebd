"""The text column of a Parquet file, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from typing import Any

from quill.errors import CorruptError, InputError, shorten

# Bytes that pyarrow reads at a time; without it, or with pre_buffer, a whole row group is in memory.
_BUFFER = 1 << 20
# Uncompressed bytes of the rows that are decoded at once, if all rows are equally long.
_BATCH = 1 << 22
# Rows may be much longer than their mean, and equal ones are stored once.
_MOST_ROWS = 256
_COLUMNS_SHOWN = 8


def read(file: FileIO, name: str, column: str) -> Iterator[str]:
    """Read the texts of one column; rows without a value are skipped.

    Args:
        file: The file, open and seekable.
        name: What messages call it.
        column: Name of the column.

    Raises:
        InputError: There is no such column, it does not contain text, or pyarrow is not installed.
        CorruptError: The file is damaged.
    """
    try:
        import pyarrow as pa  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"cannot read '{name}'",
            why="reading .parquet needs the pyarrow package",
            hint="pip install 'quill-gpt[parquet]'",
        ) from None
    row = 0
    try:
        with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
            _require_text(table.schema_arrow, name, column)
            for batch in _batches(table, column):
                for text in batch.column(0):
                    row += 1
                    if text.is_valid:
                        yield text.as_py()
    except UnicodeDecodeError as e:
        raise InputError(f"'{name}' row {row:,} is not UTF-8: byte {e.start:,}", why=e.reason) from None
    except pa.ArrowNotImplementedError as e:
        raise InputError(f"cannot read '{name}'", why=f"pyarrow: {e}") from e
    except (pa.ArrowException, OSError) as e:
        # pyarrow reports damage as an OSError without a number.
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise CorruptError(f"'{name}' is damaged", why=f"parquet: {e}") from e


def _require_text(schema: Any, name: str, column: str) -> None:
    import pyarrow as pa

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return kind in (pa.string(), pa.large_string(), pa.string_view())

    fields = {field.name: field.type for field in schema}
    if column in fields and is_text(fields[column]):
        return
    other = next((n for n, kind in fields.items() if is_text(kind) and n.isidentifier()), None)
    hint = f"set data.text_field={other}" if other and len(other) <= 40 else ""
    if column in fields:
        raise InputError(
            f"'{name}': the column {shorten(column)} is not text",
            why=f"its type is {shorten(fields[column])}",
            hint=hint,
        )
    shown = ", ".join(shorten(n) for n in list(fields)[:_COLUMNS_SHOWN]) or "none"
    more = len(fields) - _COLUMNS_SHOWN
    raise InputError(
        f"'{name}' has no column {shorten(column)}",
        why=f"its columns are {shown}{f' and {more:,} more' if more > 0 else ''}",
        hint=hint,
    )


def _batches(table: Any, column: str) -> Iterator[Any]:
    """Decode a column, a few rows at a time."""
    for number in range(table.num_row_groups):
        rows = _rows(table.metadata.row_group(number))
        yield from table.iter_batches(rows, row_groups=[number], columns=[column], use_threads=False)


def _rows(group: Any) -> int:
    """Return how many rows of a row group to decode at once, by their mean size."""
    rows: int = _BATCH * group.num_rows // max(1, group.total_byte_size)
    return max(1, min(_MOST_ROWS, rows))
