"""Compares methods to fine-tune one base on one task: `loramill compare`."""
