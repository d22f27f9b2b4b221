"""Files of tokenizers: our own directory, GPT-2's two files, Hugging Face's tokenizer.json, tiktoken's ranks."""
