"""Adjoint Matching fine-tuning of text-to-image flow models on differentiable rewards."""
