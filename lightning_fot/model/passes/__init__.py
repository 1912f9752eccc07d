"""What an attention layer does during one call: one way a file, all subclasses of ``Pass``."""
