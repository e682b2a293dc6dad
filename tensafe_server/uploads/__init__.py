"""Adapters that were made elsewhere: how they arrive, and what is checked before they count."""
