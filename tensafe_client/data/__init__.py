"""Data on its way to the service: batches, datums, JSONL, chat templates, docstrings."""

from tensafe_client.data.batches import EncodedBatch, encode_batch
from tensafe_client.data.datum import Datum
from tensafe_client.data.docstrings import DocstringPair, docstring_pairs, split_by_module
from tensafe_client.data.jsonl import Example, read_jsonl
from tensafe_client.data.loader import DataLoader

__all__ = [
    "DataLoader",
    "Datum",
    "DocstringPair",
    "EncodedBatch",
    "Example",
    "docstring_pairs",
    "encode_batch",
    "read_jsonl",
    "split_by_module",
]
