"""Byte-level BPE: training, encoding, decoding and file formats. Imports nothing else of this package."""
