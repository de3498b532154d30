"""Quantised checkpoints: what their tensors mean, layer by layer; refused by the layer's name where it is not known."""

from jaxllm.checkpoints.quantized.tensor import QuantizedTensor, dequantized, method_of, quantized_tensors

METHODS = ("compressed-tensors", "fp8", "awq", "gptq", "mxfp4", "gguf")

__all__ = ["METHODS", "QuantizedTensor", "dequantized", "method_of", "quantized_tensors"]
