"""`python -m jaxllm` is the command line."""

from jaxllm.cli import entry

entry()
