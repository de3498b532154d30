"""GGUF: one file with metadata and tensors, read as a Hugging Face checkpoint would be."""
