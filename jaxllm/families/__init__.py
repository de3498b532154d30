"""A checkpoint's configuration and tensor names, turned into a ModelConfig and the sources of its parameters."""

from jaxllm.families.registry import Family, family_of, read_config

__all__ = ["Family", "family_of", "read_config"]
