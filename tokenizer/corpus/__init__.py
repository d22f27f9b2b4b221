"""Corpora as people have them: files and folders of text, JSON lines and Parquet, compressed or not, to token files."""
