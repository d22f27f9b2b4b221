"""Files or documents in, vocabulary and merges out."""

from .train import count_words, train_bpe, train_bpe_from_counts, train_bpe_from_iterator

__all__ = ["count_words", "train_bpe", "train_bpe_from_counts", "train_bpe_from_iterator"]
