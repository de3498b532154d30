"""From files to batches: examples, documents of tokens, spans packed with them, and the order they come in."""
