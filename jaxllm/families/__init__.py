"""A checkpoint's configuration and tensor names, turned into a ModelConfig and the sources of its parameters."""
