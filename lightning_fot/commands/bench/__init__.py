"""``lightning bench``: measure, record, tune."""
