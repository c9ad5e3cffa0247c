"""How the embedded model was made and is judged: tokenizer, optimizer, training, accuracy."""
