"""Stored completions: kept in a bounded buffer when an answer ends, and written to the database in batches."""
