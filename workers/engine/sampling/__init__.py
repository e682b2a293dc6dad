"""Text: prompts in, tokens out, decoded for many operations together."""
