"""The registry's database: its engine, tables and migrations."""
