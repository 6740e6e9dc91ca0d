"""loramill on one machine: `loramill up`, `down` and `doctor`."""
