"""On-policy replay: old prompts with the champion's own answers among the new examples, against forgetting."""
