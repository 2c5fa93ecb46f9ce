"""Stage 1: images become low-pass pyramids in Parquet shards."""
