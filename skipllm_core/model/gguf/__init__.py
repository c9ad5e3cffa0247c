"""GGUF files: one file with the config, the tokenizer and the weights of a model."""
