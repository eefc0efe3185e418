"""Base and tuned model on the same noise: images, scores, statistics, validation, the panel."""
