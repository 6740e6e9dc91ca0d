"""Reads examples in many formats and converts them to the JSONL that the gateway takes.

The formats are JSONL, JSON, CSV with any common separator, Parquet, Arrow, folders of `datasets` and hub datasets
(`hf:org/name`, `hf:org/name:split`); files may be compressed, and are recognized by their content. The same rules apply
to all of them: columns are recognized, or `columns` names them ({"prompt": "question", "completion": "answer"}); other
columns are left out with a warning; each row becomes a line. JSONL that needs no change is uploaded byte for byte.
"""

from loramill.data.ingest.columnar import HUB
from loramill.data.ingest.reader import Columns, PreparedSource
from loramill.data.ingest.source import read_source

__all__ = ["HUB", "Columns", "PreparedSource", "read_source"]
