"""What the user asked for, read and checked before torch loads."""
