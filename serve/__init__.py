"""Personalized endpoints: gateway, engine replica, engine. Floor 1; never imports jobs."""
