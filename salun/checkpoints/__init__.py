"""What a model is on disk: single files and diffusers folders, read lazily and written as a stream."""
