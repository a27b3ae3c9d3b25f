"""What a person looks at after a run: pictures before and after, charts, and one self-contained page."""
