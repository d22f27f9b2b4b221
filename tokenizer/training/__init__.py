"""Files or documents in, vocabulary and merges out."""

from .train import train_bpe, train_bpe_from_iterator

__all__ = ["train_bpe", "train_bpe_from_iterator"]
