"""Sweeps: many retrievers, settings, sizes and trainings in one folder, whose finished cells are never done twice."""
