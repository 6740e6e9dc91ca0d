"""Personalized endpoints: gateway, engine replica, engine. Layer 1; never imports jobs."""
