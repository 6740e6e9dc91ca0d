"""Commands for tenants: their shares and limits, API keys, usage and audit log."""
