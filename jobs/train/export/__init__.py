"""Exports what was trained: adapter files, merged and full models, and a LoRA extracted from a full fine-tune."""
