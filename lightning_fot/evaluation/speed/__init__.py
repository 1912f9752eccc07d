"""Time: what was measured, where it went, and what the machine allows."""
