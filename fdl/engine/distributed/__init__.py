"""Processes, devices and sharding."""
