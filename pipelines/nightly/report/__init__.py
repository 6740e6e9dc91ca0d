"""The report of a nightly run: as a value, as JSON, as one HTML page, and as a message to a webhook."""
