"""What one step of the engine runs: a pure decision over waiting and running sequences and their KV blocks."""
