"""From a concept to prompts."""
