"""Durable state: tenants, keys, runs, the operation log, metrics, artifacts' descriptions."""
