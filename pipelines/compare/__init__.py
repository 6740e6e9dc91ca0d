"""Ways to fine-tune one base on one task, measured side by side: `loramill compare`."""
