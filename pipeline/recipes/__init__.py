"""Complete named experiments."""
