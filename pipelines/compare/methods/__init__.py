"""Methods that are compared: loramill's, transformers', prefix and bottleneck adapters."""
