"""The bundled model: its corpus, tokenizer, training and evaluation."""
