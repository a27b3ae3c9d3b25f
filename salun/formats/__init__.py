"""Files: safetensors read lazily and written deterministically, hashes of models, sparse deltas."""
