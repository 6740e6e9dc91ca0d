"""Methods that exist for comparison only, since the engine does not serve them."""
