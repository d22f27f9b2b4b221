"""Training data: token files, corpora of them, the order in which windows are drawn, batches and documents."""

from .batches import Batch, Batches, batch_generator, get_batch, validation_batches
from .corpus import Corpus, Source, open_corpus
from .documents import IGNORED, bounds_of, document_bounds, end_of_document
from .order import ORDERS
from .tokens import TokenFile, open_tokens

__all__ = [
    "IGNORED",
    "ORDERS",
    "Batch",
    "Batches",
    "Corpus",
    "Source",
    "TokenFile",
    "batch_generator",
    "bounds_of",
    "document_bounds",
    "end_of_document",
    "get_batch",
    "open_corpus",
    "open_tokens",
    "validation_batches",
]
