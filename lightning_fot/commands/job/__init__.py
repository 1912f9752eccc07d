"""The main job of ``run``, and of ``fit``, ``validate`` and ``test``."""
