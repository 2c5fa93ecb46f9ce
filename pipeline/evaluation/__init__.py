"""Stage 3: the models are attacked and judged by Ray tasks."""
