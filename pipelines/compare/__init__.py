"""Methods side by side on a user's own data."""
