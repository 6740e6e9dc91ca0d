"""How requests and tokens travel between clients, gateways and replicas."""
