"""What every stage stands on: storage, Ray, leases, the console."""
