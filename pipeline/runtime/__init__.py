"""The base of all stages: storage, Ray, leases and the console."""
