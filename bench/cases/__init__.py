"""What is measured: the kernels beside their peers, and the tokenizer beside its own."""
