"""The registry's content-addressed artifacts, in a local folder or an object store."""
