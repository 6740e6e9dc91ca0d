"""Commands for fine-tune jobs: submit, plan, watch and control them, and manage their files."""
