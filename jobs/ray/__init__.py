"""The supervisor on Ray, and the training processes that it launches."""
