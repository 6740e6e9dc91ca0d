"""Commands for adapters: their versions, aliases and nightly runs, chats, and batch generation."""
