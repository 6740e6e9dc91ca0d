"""Tables and charts of a comparison."""
