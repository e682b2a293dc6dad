"""Big values, as files or objects: artifacts, tokenizers, large payloads."""
