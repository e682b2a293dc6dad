"""Who calls: tenants, keys, and what each kind of key may do."""
