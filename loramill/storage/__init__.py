"""Files: atomic writes, object stores, locks between processes, and headers of safetensors files."""
