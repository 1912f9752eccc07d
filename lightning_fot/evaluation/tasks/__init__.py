"""Long-context tasks: text in the memory, questions beside it. One file a task.

``settings`` says what can be set (it imports nothing heavy), ``registry`` which class makes the examples, ``runner``
reads and asks, ``summary`` counts. A task is a class with ``episodes(length)``: see
:class:`~lightning_fot.evaluation.tasks.parts.episode.Task`.
"""
