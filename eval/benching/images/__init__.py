"""Methods compared on the embedded model's images."""
