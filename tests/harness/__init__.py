"""What several tests start or make: a tiny model, the command line."""
