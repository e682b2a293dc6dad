"""The base models that operators have registered."""
