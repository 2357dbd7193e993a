"""Tables of labelled images: rows of texts, lists and embedded images out of CSV, TSV, JSON lines and Parquet. Torch-free."""

from __future__ import annotations

from finetune.data.tables.rows import SUFFIXES, Cell, Embedded, Row, Table, open_table

__all__ = ["SUFFIXES", "Cell", "Embedded", "Row", "Table", "open_table"]
