"""Jobs on Ray: the supervisor, and the processes that it launches."""
