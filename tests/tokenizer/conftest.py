"""A busy machine is no failure: Hypothesis has no deadline in these tests."""

from hypothesis import settings

settings.register_profile("tokenizer", deadline=None)
settings.load_profile("tokenizer")
