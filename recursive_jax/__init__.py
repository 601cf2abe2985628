"""Relaxed Recursive Transformers in JAX: fold a pretrained model's layers into one looped block."""

__version__ = "0.1.0"
