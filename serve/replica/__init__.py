"""An engine replica: text in, tokens through the engine, text out."""
