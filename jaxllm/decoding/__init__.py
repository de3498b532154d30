"""Ways to decode that call the engine: beam search."""
