"""One better image without training: a frozen sampler's noise or prompt embeddings, moved by a reward."""
